"""The export command, and what both formats refuse."""

import dataclasses
import json
import sys

import jax
import jax.export
import jax.numpy as jnp
import pytest
from exports import CONFIG, run_command
from flax import nnx
from reference import SHALLOW, meta_sam, ours

import sam_jax
from sam_jax import MissingExtra
from sam_jax.export import export_jax, export_onnx

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    sam_jax.save_pretrained(model, folder)
    return folder


def test_command(saved, tmp_path, capsys):
    out = tmp_path / "out"
    run_command("export", saved, "--output", out, "--platforms", "cpu", "--dtype", "bfloat16")
    assert capsys.readouterr().out == f"{out}\n"
    names = {"config.json", "params.safetensors"}
    names |= {f"{name}.jax" for name in ("encoder", "decoder", "decoder_with_masks")}
    assert {path.name for path in out.iterdir()} == names
    config = json.loads((out / "config.json").read_text())
    assert config["platforms"] == ["cpu"]
    assert config["dtype"] == "bfloat16"
    assert config["image_size"] == CONFIG.image_size
    assert config["mask_size"] == CONFIG.mask_size
    assert config["vjp_order"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "/no/such/model"),
        (
            ["--format", "onnx", "--dtype", "bfloat16"],
            "--dtype and --gradient are for --format jax",
        ),
        (["--format", "onnx", "--platforms", "cpu"], "--platforms, --dtype and --gradient are"),
        (["--format", "onnx", "--gradient"], "--platforms, --dtype and --gradient are for"),
        (["--single-mask"], "--single-mask is for --format onnx"),
        (["--platforms", "cpu", "cpu"], "platforms are ['cpu', 'cpu'], expected"),
        (["--platforms"], "platforms are [], expected some of ['cpu', 'cuda', 'rocm', 'tpu']"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_refuses(saved, tmp_path, arguments, message):
    if arguments[0].startswith("--"):
        arguments = [saved, *arguments]
    with pytest.raises(SystemExit) as exit_info:
        run_command("export", *arguments, "--output", tmp_path / "out")
    assert exit_info.value.code.startswith("sam-jax: ")
    assert message in exit_info.value.code
    assert "\n" not in exit_info.value.code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export_jax, export_onnx])
def test_nothing_is_overwritten(write, model, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"):
        write(model, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"sam-jax: .*out exists already"):
        run_command("export", "/no/such/model", "--output", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("write", [export_jax, export_onnx])
def test_nothing_is_left_half_written(write, model, tmp_path, monkeypatch):
    """Simulates a full disk while the settings, the last file, are written."""

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"{write.__module__}.write_config", full)
    monkeypatch.setattr(jax.export, "export", lambda *_, **__: lambda *_: Serialized())
    with pytest.raises(OSError, match="No space left"):
        write(model, tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


class Serialized:
    def serialize(self, vjp_order):
        return b""


class HalfPrecision(nnx.Module):
    """A custom encoder that computes in bfloat16 and returns float32."""

    def __call__(self, pixel_values):
        x = pixel_values.astype(jnp.bfloat16)[:, ::8, ::8, :1] * 2
        return jnp.tile(x, (1, 1, 1, SHALLOW.prompt_embed_dim)).astype(jnp.float32)


def test_refusals(tmp_path, unchecked, monkeypatch):
    for named in ("pallas", "cudnn"):
        model = ours(meta_sam(SHALLOW), SHALLOW, dtype=jnp.bfloat16, attention=named)
        with pytest.raises(ValueError, match=f"attention is '{named}', which JAX cannot export"):
            export_jax(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"platforms are \['gpu'\], expected some of \['cpu'"):
        export_jax(model, tmp_path / "out", platforms=["gpu"])
    with pytest.raises(ValueError, match="computes in bfloat16, but ONNX is written in float32"):
        export_onnx(model, tmp_path / "out")
    model = ours(meta_sam(SHALLOW), SHALLOW)
    model.image_encoder = HalfPrecision()
    with pytest.raises(ValueError, match="computes in bfloat16, but ONNX is written in float32"):
        export_onnx(model, tmp_path / "out")
    medsam = dataclasses.replace(SHALLOW, normalization="min_max")
    with pytest.raises(ValueError, match="but the ONNX encoder normalizes by mean and st"):
        export_onnx(ours(meta_sam(medsam), medsam), tmp_path / "out")
    monkeypatch.delitem(sys.modules, "sam_jax.export.onnx_graph", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r'pip install "sam_jax\[onnx\]"'):
        export_onnx(ours(meta_sam(SHALLOW), SHALLOW), tmp_path / "out")
    assert not list(tmp_path.iterdir())
