import dataclasses
import json
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import SMALL, assert_close, hf_sam, meta_sam, normal, ours
from safetensors.torch import save_file
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import sam_jax.checkpoints
from sam_jax import CheckpointError, SamProcessor, from_pretrained, save_pretrained
from sam_jax.checkpoints import load_config, load_params, write_checkpoint
from sam_jax.checkpoints.params import flat_params

# Shapes do not determine the decoder's number of heads; without a configuration, it is 8.
META = dataclasses.replace(SMALL, mask_decoder=dataclasses.replace(SMALL.mask_decoder, num_heads=8))
HF = dataclasses.replace(
    META, mask_decoder=dataclasses.replace(META.mask_decoder, layer_norm_eps=1e-6)
)


@pytest.fixture(scope="module")
def meta():
    return meta_sam(META)


@pytest.fixture(scope="module")
def hf():
    return hf_sam(HF)


def assert_same_model(model, expected):
    assert model.config == expected.config
    actual, expected = flat_params(model), flat_params(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_meta_file(meta, tmp_path, suffix):
    file = tmp_path / f"sam{suffix}"
    if suffix == ".safetensors":
        save_file(meta.state_dict(), file)
    else:
        torch.save(meta.state_dict(), file)
    assert_same_model(from_pretrained(file), ours(meta, META))
    assert load_config(file) == META


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin", "sharded_bin"])
def test_hugging_face_folder(hf, tmp_path, kind):
    if "bin" in kind:  # as older versions of transformers wrote them
        tensors = dict(hf.state_dict())
        names = sorted(tensors)
        halves = [names] if kind == "bin" else [names[::2], names[1::2]]
        files = ["pytorch_model.bin"] if kind == "bin" else ["shard-1.bin", "shard-2.bin"]
        for file, half in zip(files, halves, strict=True):
            torch.save({n: tensors[n] for n in half}, tmp_path / file)
        if kind == "sharded_bin":
            weight_map = {n: f for f, half in zip(files, halves, strict=True) for n in half}
            index = {"weight_map": weight_map}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        hf.config.save_pretrained(tmp_path)
    else:
        hf.save_pretrained(tmp_path, max_shard_size="100KB" if kind == "sharded" else "5GB")
        assert (tmp_path / "model.safetensors").exists() == (kind == "safetensors")
    assert_same_model(from_pretrained(tmp_path), ours(hf, HF))


def test_hugging_face_file(hf, tmp_path):
    """Without a config.json next to it, the shapes determine the configuration."""
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert_same_model(from_pretrained(file), ours(hf, HF))
    (tmp_path / "config.json").unlink()
    assert_same_model(from_pretrained(file), ours(hf, HF))


def test_preprocessor_in_a_folder(hf, tmp_path):
    hf.save_pretrained(tmp_path)
    values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    config = SamProcessor.from_pretrained(tmp_path).config
    assert config.pixel_mean == (127.5, 127.5, 127.5)
    assert config.pixel_std == (63.75, 127.5, 255.0)


@pytest.mark.parametrize("files", ["processor", "preprocessor", "both"])
def test_preprocessors_saved_by_transformers(hf, tmp_path, files):
    """In the processor's file, the image processor's, or both, as transformers reads them."""
    hf.save_pretrained(tmp_path)
    size = {"size": {"longest_edge": 96}, "pad_size": {"height": 96, "width": 96}}
    image_processor = SamImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3, **size)
    if files != "preprocessor":
        transformers.SamProcessor(image_processor).save_pretrained(tmp_path)
    if files != "processor":
        other = {"image_mean": [0.1] * 3} if files == "both" else {}
        SamImageProcessorPil.from_dict(image_processor.to_dict() | other).save_pretrained(tmp_path)
    theirs = SamImageProcessorPil.from_pretrained(tmp_path)
    config = SamProcessor.from_pretrained(tmp_path).config
    assert theirs.image_mean == (0.5, 0.5, 0.5)
    assert config.pixel_mean == tuple(255 * m for m in theirs.image_mean)
    assert config.pixel_std == tuple(255 * s for s in theirs.image_std)


def test_pruned_hugging_face_model(tmp_path):
    """SlimSAM has narrow heads, and an MLP size that is not a multiple of the width."""
    encoder = dataclasses.replace(HF.image_encoder, embed_dim=42, num_heads=3, mlp_dim=174)
    config = dataclasses.replace(HF, image_encoder=encoder)
    model = hf_sam(config)
    model.save_pretrained(tmp_path)
    assert_same_model(from_pretrained(tmp_path), ours(model, config))


def test_our_folder(meta, tmp_path):
    model = ours(meta, META)
    save_pretrained(model, tmp_path / "sam")
    assert_same_model(from_pretrained(tmp_path / "sam"), model)
    assert load_config(tmp_path / "sam") == META
    with pytest.raises(FileExistsError, match="exists already"):
        save_pretrained(model, tmp_path / "sam")


def test_options(meta, tmp_path):
    torch.save(meta.state_dict(), tmp_path / "sam.pth")
    model = from_pretrained(tmp_path / "sam.pth", dtype=jnp.bfloat16, image_size=64)
    assert model.config == dataclasses.replace(META, image_size=64)
    embedding = model.get_image_embeddings(np.asarray(normal((1, 64, 64, 3))))
    assert embedding.shape == (1, 32, 8, 8)
    assert embedding.dtype == jnp.bfloat16
    assert flat_params(model)["image_encoder.neck.conv1.kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("sam_vit_b", ValueError, "mobile_sam, vit_b, vit_l, vit_h"),
        ("missing/sam.pth", FileNotFoundError, "missing/sam.pth"),
        ("./nothing", FileNotFoundError, "nothing"),
    ],
)
def test_unknown_names(name, error, message):
    with pytest.raises(error, match=message):
        from_pretrained(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "web page"),
        (b"PK\x03\x04 cut off", "unfinished download"),
    ],
)
def test_files_that_are_not_checkpoints(tmp_path, content, message):
    file = tmp_path / "sam.pth"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(file)
    assert str(file) in str(caught.value)


def test_truncated_file(meta, tmp_path):
    file = tmp_path / "sam.pth"
    torch.save(meta.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"sam\.pth"):
        from_pretrained(file)


def test_another_model(tmp_path):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(CheckpointError, match="not a SAM checkpoint"):
        from_pretrained(tmp_path / "linear.pth")


def test_folders_that_are_not_checkpoints(hf, tmp_path):
    with pytest.raises(CheckpointError, match="does not have a checkpoint"):
        from_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model, expected model_type 'sam'"):
        from_pretrained(tmp_path)
    config.write_text('{"learning_rate": 0.1}')
    with pytest.raises(
        CheckpointError, match=r"has no model_type, expected .* path of the weights' file"
    ):
        from_pretrained(tmp_path)
    for content in ("{", "[" * 100_000):
        config.write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json is (not JSON|nested)"):
            from_pretrained(tmp_path)


@pytest.mark.parametrize("values", [{"learning_rate": 0.1}, {"model_type": "bert"}, {}])
def test_an_unrelated_config_next_to_a_file_is_ignored(hf, tmp_path, values):
    hf.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": "other"}))
    assert load_config(tmp_path / "model.safetensors") == HF


@pytest.mark.parametrize("content", ["[1, 2]", "{", "", "[" * 1000, " " * (2**20 + 1)])
def test_an_invalid_config_next_to_a_file_warns(hf, tmp_path, content):
    hf.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.warns(UserWarning, match=r"config\.json .*; the configuration is inferred"):
        assert load_config(tmp_path / "model.safetensors") == HF
    with pytest.raises(CheckpointError, match=r"config\.json "):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_a_bad_preprocessor_is_named(hf, tmp_path, name):
    hf.save_pretrained(tmp_path)
    (tmp_path / name).write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=rf"{name} is \[1, 2\], expected names and values"):
        from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "left_out"),
    [
        ("module.", "'module.'"),
        ("module._orig_mod.", "'_orig_mod.' and 'module.'"),
        ("model.sam.", "'model.sam.'"),
        ("net.module.", "'module.' and 'net.'"),
        ("image_encoder.", "'image_encoder.'"),
    ],
)
@pytest.mark.parametrize("kind", ["pth", "safetensors", "hf"])
def test_a_common_prefix_is_removed(meta, hf, tmp_path, kind, prefix, left_out):
    source, config, path = meta, META, tmp_path / f"sam.{kind}"
    if kind == "hf":
        source, config, path = hf, HF, tmp_path
        hf.config.save_pretrained(tmp_path)
    tensors = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    if kind == "pth":
        torch.save({"model": tensors}, path)
    else:
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()},
            path / "model.safetensors" if kind == "hf" else path,
        )
    with pytest.warns(UserWarning, match=f"removed {left_out} from the names of the tensors"):
        params, found = load_params(path)
    assert found == config
    for name, value in flat_params(ours(source, config)).items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)


def test_weights_with_nan_or_infinity_are_refused(meta, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in meta.state_dict().items()}
    tensors["image_encoder.neck.0.weight"][0, 0] = float("nan")
    tensors["mask_decoder.iou_token.weight"][0, 1] = float("-inf")
    torch.save(tensors, tmp_path / "sam.pth")
    message = r"sam\.pth: 2 of \d+ .* NaN or infinity: image_encoder\.neck\.conv1\.kernel, mask_dec"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "sam.pth")


@pytest.mark.parametrize(
    "name", ["sam.pth", "sam.safetensors", "model.safetensors", "config.json", "shard.bin"]
)
def test_a_pipe_is_not_waited_for(hf, tmp_path, name):
    if name in ("config.json", "shard.bin"):
        hf.save_pretrained(tmp_path)
        (tmp_path / "config.json").unlink()
    if name == "shard.bin":
        (tmp_path / "model.safetensors").unlink()
        index = {"weight_map": {"w": name}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    os.mkfifo(tmp_path / name)
    if name == "config.json":  # ignored
        assert load_config(tmp_path) == HF
        return
    path = tmp_path / name if name.startswith("sam") else tmp_path
    with pytest.raises(CheckpointError, match=r"is not a file|does not have a checkpoint"):
        from_pretrained(path)


@pytest.mark.slow
def test_hugging_face_loads_written_checkpoints(meta, tmp_path):
    """Hugging Face's model gives the same masks with Meta's weights, renamed."""
    torch.save(meta.state_dict(), tmp_path / "sam.pth")
    params, config = load_params(tmp_path / "sam.pth")
    write_checkpoint(tmp_path / "hf/model.safetensors", params, config=config, fmt="hf")
    # The configuration has the decoder's number of heads and Meta's epsilon.
    theirs, report = transformers.SamModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels, points = np.array(normal((1, 96, 96, 3))), np.array([[[[30.0, 40.0]]]], np.float32)
    with torch.no_grad():
        expected = theirs(
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)),
            input_points=torch.from_numpy(points),
        )
    actual = from_pretrained(tmp_path / "sam.pth")(pixels, points)
    assert_close(actual.pred_masks, expected.pred_masks)
    assert_close(actual.iou_scores, expected.iou_scores)


def test_a_write_that_fails_leaves_nothing(meta, tmp_path, monkeypatch):
    torch.save(meta.state_dict(), tmp_path / "sam.pth")
    params, config = load_params(tmp_path / "sam.pth")

    def full(path, tensors):
        shutil.copytree(path.parent, tmp_path / "killed")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sam_jax.checkpoints, "write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(tmp_path / "hf/model.safetensors", params, config=config, fmt="hf")
    assert list((tmp_path / "hf").iterdir()) == []
    # What a killed process left there does not block a new write.
    write_checkpoint(tmp_path / "killed/model.safetensors", params, config=config, fmt="hf")
    assert load_config(tmp_path / "killed") == config


@pytest.mark.parametrize(
    "name",
    [
        "mask_decoder.transformer.layers.100000000.norm1.weight",
        "image_encoder.blocks.100000000.norm1.weight",
        "mask_decoder.iou_prediction_head.layers.100000000.weight",
    ],
)
def test_a_forged_layer_index_is_refused(meta, tmp_path, name):
    """A forged index does not make a model of that many layers."""
    torch.save({**meta.state_dict(), name: torch.zeros(1)}, tmp_path / "sam.pth")
    message = rf"\(1 problem\):\n  unexpected: {re.escape(name)} \(1,\)$"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "sam.pth")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "part", "name", "value", "message"),
    [
        (
            "hf",
            "vision_config",
            "num_hidden_layers",
            10**8,
            "is 100000000, expected .* up to 65536",
        ),
        ("hf", "vision_config", "num_hidden_layers", 2000, "depth is 2000, expected int up to 128"),
        ("hf", "vision_config", "num_hidden_layers", 128, "has 128 blocks, .* there are only"),
        ("ours", "mask_decoder", "transformer_depth", 2000, "is 2000, expected int up to 128"),
        ("ours", "mask_decoder", "transformer_depth", 20, "blocks, 20 decoder .* there are only"),
        ("ours", "mask_decoder", "num_multimask_outputs", 100, "100 outputs, .* there are only"),
    ],
)
def test_a_configuration_of_too_many_layers(hf, tmp_path, kind, part, name, value, message):
    hf.save_pretrained(tmp_path / "hf")
    save_pretrained(ours(hf, HF), tmp_path / "ours")
    file = tmp_path / kind / "config.json"
    values = json.loads(file.read_text())
    values[part][name] = value
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / kind)


def test_model_and_processor_agree_on_a_folder(meta, tmp_path):
    """Both infer it from the shapes of Meta's tensors, whatever config.json says."""
    save_file(meta.state_dict(), tmp_path / "model.safetensors")
    transformers.SamConfig().save_pretrained(tmp_path)
    assert load_config(tmp_path) == load_params(tmp_path)[1]
    assert load_config(tmp_path).image_size == 96


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_overwritten(meta, tmp_path):
    torch.save(meta.state_dict(), tmp_path / "sam.pth")
    params, config = load_params(tmp_path / "sam.pth")
    with pytest.raises(FileExistsError, match="exists already"):
        write_checkpoint(tmp_path / "sam.pth", params, config=config, fmt="meta")
    with pytest.raises(ValueError, match=r"looks for model.safetensors or pytorch_model.bin"):
        write_checkpoint(tmp_path / "sam.safetensors", params, config=config, fmt="hf")
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"config\.json exists"):
        write_checkpoint(tmp_path / "model.safetensors", params, config=config, fmt="hf")
    with pytest.raises(ValueError, match=r"\.h5.*suffix must be one of"):
        write_checkpoint(tmp_path / "sam.h5", params, config=config, fmt="meta")
    with pytest.raises(ValueError, match=r"fmt is 'HF', expected one of \['meta', 'hf'\]"):
        write_checkpoint(tmp_path / "other.pth", params, config=config, fmt="HF")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "sam.pth"]


def test_incomplete_parameters_are_not_written(meta, tmp_path):
    torch.save(meta.state_dict(), tmp_path / "sam.pth")
    params, config = load_params(tmp_path / "sam.pth")
    name = "prompt_encoder.no_mask_embed"
    adapted = {**params, "image_encoder.blocks.0.attn.qkv.lora_a": np.ones((32, 2))}
    for changed, message in (
        ({}, f"missing: {name}"),
        ({k: v for k, v in params.items() if k != name}, f"missing: {name}"),
        (adapted, r"save merge_lora\(model\)"),
    ):
        for fmt in ("meta", "hf"):
            with pytest.raises(CheckpointError, match=message):
                write_checkpoint(tmp_path / "new.safetensors", changed, config=config, fmt=fmt)
    assert [p.name for p in tmp_path.iterdir()] == ["sam.pth"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float31"}, "dtype is 'float31', expected float32, bfloat16 or float16"),
        ({"attention": "flash"}, "unknown attention implementation 'flash'"),
        ({"preprocessing": "sam"}, "preprocessing is 'sam', expected 'medsam' or None"),
    ],
)
def test_options_are_checked_before_the_weights_are_read(options, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained("./nothing", **options)


def test_medsam_preprocessing_is_kept(tmp_path, meta, unchecked):
    torch.save(meta.state_dict(), tmp_path / "medsam.pth")
    model = from_pretrained(tmp_path / "medsam.pth", preprocessing="medsam")
    assert (model.config.resize, model.config.normalization) == ("square", "min_max")
    processor = SamProcessor.from_pretrained(tmp_path / "medsam.pth", preprocessing="medsam")
    assert processor.config == model.config
    save_pretrained(model, tmp_path / "medsam")
    assert from_pretrained(tmp_path / "medsam").config == model.config
    with pytest.raises(ValueError, match="preprocessing is 'sam'"):
        from_pretrained(tmp_path / "medsam.pth", preprocessing="sam")
