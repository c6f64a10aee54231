"""The scripts of convert/."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import flax_to_torch
import numpy as np
import pytest
import torch
import torch_to_flax
import transformers
from reference import SMALL, SMALL_TINY, hf_sam, meta_sam, ours

from sam_jax import save_pretrained
from sam_jax.checkpoints import load_config, write_checkpoint
from sam_jax.checkpoints.params import param_shapes
from sam_jax.config import lite_medsam, with_preprocessing

pytestmark = pytest.mark.slow

SCRIPTS = Path(torch_to_flax.__file__).parent
VIT, TINY = (
    dataclasses.replace(c, mask_decoder=dataclasses.replace(c.mask_decoder, num_heads=8))
    for c in (SMALL, SMALL_TINY)
)

HF = dataclasses.replace(
    SMALL, mask_decoder=dataclasses.replace(SMALL.mask_decoder, layer_norm_eps=1e-6)
)


def to_ours(checkpoint, output, **options):
    torch_to_flax.main(torch_to_flax.Args(str(checkpoint), output, **options))


def to_torch(checkpoint, output, fmt):
    flax_to_torch.main(flax_to_torch.Args(str(checkpoint), output, fmt))


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_meta_to_ours_to_hf_to_ours_to_meta(tmp_path):
    original = meta_sam(VIT).state_dict()
    torch.save(original, tmp_path / "sam.pth")
    to_ours(tmp_path / "sam.pth", tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "hf/model.safetensors", "hf")
    to_ours(tmp_path / "hf", tmp_path / "ours_again")
    to_torch(tmp_path / "ours_again", tmp_path / "again.pth", "meta")
    assert_same_bits(torch.load(tmp_path / "again.pth", weights_only=True), original)


def test_mobile_sam_and_back(tmp_path):
    original = meta_sam(TINY).state_dict()
    torch.save(original, tmp_path / "mobile_sam.pt")
    to_ours(tmp_path / "mobile_sam.pt", tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "again.pt", "meta")
    assert_same_bits(torch.load(tmp_path / "again.pt", weights_only=True), original)


def test_bits_of_special_numbers_survive(tmp_path):
    sam = meta_sam(VIT)
    special = torch.tensor([np.nan, np.inf, -np.inf, -0.0, 1e-45], dtype=torch.float32)
    sam.image_encoder.neck[0].weight.data.view(-1)[:5] = special
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    to_ours(tmp_path / "sam.pth", tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "again.pth", "meta")
    assert_same_bits(torch.load(tmp_path / "again.pth", weights_only=True), sam.state_dict())


def test_bfloat16(tmp_path):
    sam = meta_sam(VIT)
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    to_ours(tmp_path / "sam.pth", tmp_path / "ours", dtype="bfloat16")
    to_torch(tmp_path / "ours", tmp_path / "again.pth", "meta")
    for name, tensor in torch.load(tmp_path / "again.pth", weights_only=True).items():
        expected = sam.state_dict()[name]
        if "gaussian" not in name:  # positions are encoded in float32
            expected = expected.bfloat16()
        assert torch.equal(tensor, expected), name


def test_config_round_trip_through_hf(tmp_path):
    """Keeps the decoder's heads and epsilon, and the pixel statistics, which no tensor shows."""
    config = dataclasses.replace(HF, pixel_mean=(25.5, 51.0, 76.5), pixel_std=(51.0, 102.0, 153.0))
    save_pretrained(ours(hf_sam(HF), config), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "hf/model.safetensors", "hf")
    assert load_config(tmp_path / "hf") == config
    processor = transformers.SamImageProcessor.from_pretrained(tmp_path / "hf")
    np.testing.assert_allclose(processor.image_mean, (0.1, 0.2, 0.3))
    assert processor.size["longest_edge"] == processor.pad_size["height"] == 96


def test_warns_of_values_that_metas_format_lacks(tmp_path):
    save_pretrained(ours(hf_sam(HF), HF), tmp_path / "ours")
    with pytest.warns(UserWarning, match=r"mask_decoder.num_heads is 4, inferred as 8$"):
        to_torch(tmp_path / "ours", tmp_path / "sam.pth", "meta")


@pytest.mark.parametrize("fmt", ["meta", "hf"])
def test_verify(tmp_path, capsys, fmt):
    if fmt == "meta":
        torch.save(meta_sam(VIT).state_dict(), tmp_path / "sam.pth")
        checkpoint = tmp_path / "sam.pth"
    else:
        checkpoint = tmp_path / "hf"
        hf_sam(VIT).save_pretrained(checkpoint)
    to_ours(checkpoint, tmp_path / "ours", verify=True)
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert lines[0].startswith("Largest difference")
    for line in lines[1:4]:
        assert float(line.split(":")[1]) < 1e-5
    assert lines[4].split(":")[1].strip() == "1.000000"


@pytest.mark.parametrize("missing", ["torch", "segment_anything"])
def test_verify_needs_the_reference(tmp_path, monkeypatch, missing):
    torch.save(meta_sam(VIT).state_dict(), tmp_path / "sam.pth")
    monkeypatch.delitem(sys.modules, "torch_reference")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"cannot be imported: .*{missing}"):
        to_ours(tmp_path / "sam.pth", tmp_path / "ours", verify=True)
    assert not (tmp_path / "ours").exists()


def test_medsam_preprocessing_is_kept(tmp_path):
    torch.save(meta_sam(VIT).state_dict(), tmp_path / "medsam.pth")
    to_ours(tmp_path / "medsam.pth", tmp_path / "ours", preprocessing="medsam")
    assert load_config(tmp_path / "ours") == with_preprocessing(VIT, "medsam")


def test_lite_medsam_is_not_verified(tmp_path):
    params = {k: np.zeros(shape, np.float32) for k, shape in param_shapes(lite_medsam()).items()}
    write_checkpoint(tmp_path / "lite.safetensors", params, config=lite_medsam(), fmt="meta")
    with pytest.raises(ValueError, match="does not support SAM-HQ and LiteMedSAM"):
        to_ours(tmp_path / "lite.safetensors", tmp_path / "ours", verify=True)
    assert not (tmp_path / "ours").exists()


def test_our_own_folder_cannot_be_verified(tmp_path):
    torch.save(meta_sam(VIT).state_dict(), tmp_path / "sam.pth")
    to_ours(tmp_path / "sam.pth", tmp_path / "ours")
    with pytest.raises(ValueError, match="is already a sam_jax folder"):
        to_ours(tmp_path / "ours", tmp_path / "copy", verify=True)
    assert not (tmp_path / "copy").exists()


def test_errors_are_one_line(tmp_path):
    for script, *args in (
        ("torch_to_flax.py", "--output", "ours"),
        ("flax_to_torch.py", "--output", "b.pth", "--format", "meta"),
    ):
        command = [sys.executable, SCRIPTS / script, "--checkpoint", "missing.pth", *args]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 1
        assert run.stderr.startswith("error: missing.pth does not exist; pass a short name")
        assert run.stderr.count("\n") == 1


def test_existing_output_is_kept(tmp_path):
    torch.save(meta_sam(VIT).state_dict(), tmp_path / "sam.pth")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        to_ours(tmp_path / "sam.pth", tmp_path / "ours")
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["mine.txt"]


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path):
    tensors = meta_sam(VIT).state_dict()
    del tensors["image_encoder.neck.0.weight"]
    torch.save(tensors, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"missing: image_encoder\.neck\.0\.weight"):
        to_ours(tmp_path / "sam.pth", tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["sam.pth"]


def test_no_torch_is_needed(tmp_path):
    """Both scripts run from the shell in an environment where importing torch fails."""
    torch.save(meta_sam(VIT).state_dict(), tmp_path / "sam.pth")
    block = """
import importlib.abc, runpy, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""
    for script, *args in (
        ("torch_to_flax.py", "--checkpoint", "sam.pth", "--output", "ours"),
        ("flax_to_torch.py", "--checkpoint", "ours", "--output", "b.pth", "--format", "meta"),
    ):
        code = f"{block}sys.argv = {[script, *args]!r}\n"
        code += f"runpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_same_bits(
        torch.load(tmp_path / "b.pth", weights_only=True),
        torch.load(tmp_path / "sam.pth", weights_only=True),
    )
