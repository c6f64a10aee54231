"""Options of `examples/finetune.py`, without a run."""

import importlib
import sys
from pathlib import Path

import jax
import pytest
from finetuning import (
    config_of,
    finetune,
    model_fixture,  # noqa: F401
)
from reference import SHALLOW

from sam_jax import from_pretrained
from sam_jax.training.rules import layer_decay
from sam_jax.training.transform import ExampleTransform

pytestmark = pytest.mark.slow

NOWHERE = Path("cells"), Path("model"), Path("run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps, --eval-every and --batch-size must be at least 1"),
        (("--num-rounds", "0"), "num_rounds is 0, expected a whole number of at least 1"),
        (("--batch-size", "3"), "--batch-size is 3, expected a multiple of the 2 devices"),
        (("--accumulate", "4"), "--batch-size is 2, expected a multiple of the 4 parts of --acc"),
        (("--layer-decay", "0.5"), "--layer-decay is for --train everything"),
        (
            ("--remat",),
            "--remat requires a trained image encoder: --train lora or --train everything",
        ),
        (("--train", "hq", "--drop-path-rate", "0.1"), "--drop-path-rate requires a trained"),
    ],
)
def test_bad_options(options, message, monkeypatch):
    """Errors come before anything is read: neither the model nor the images exist here."""
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        finetune.main(config_of(*NOWHERE, *options))


def test_options_of_the_model_and_the_images(monkeypatch):
    def load(name, *, dtype):
        raise InterruptedError(f"{name} in {dtype}")

    monkeypatch.setattr(finetune, "from_pretrained", load)
    with pytest.raises(InterruptedError, match="model in bfloat16"):
        finetune.main(config_of(*NOWHERE, "--dtype", "bfloat16"))
    transform = finetune.make_transform(SHALLOW, config_of(*NOWHERE))
    assert transform == ExampleTransform(SHALLOW, 2, target_size=SHALLOW.mask_size)
    options = "--full-resolution", "--flip", "0.5", "--scale-range", "0.5", "2"
    transform = finetune.make_transform(SHALLOW, config_of(*NOWHERE, *options))
    assert transform == ExampleTransform(
        SHALLOW, 2, target_size=SHALLOW.image_size, flip=0.5, scale_range=(0.5, 2.0)
    )


def test_trained_parts(model):
    plain = from_pretrained(model)
    options = "--train", "everything", "--layer-decay", "0.5"
    found, table = finetune.build_trainable(plain, config_of(*NOWHERE, *options))
    assert found is plain
    assert table == layer_decay(SHALLOW, 0.5)
    options = "--train", "lora", "--lora-rank", "3"
    found, table = finetune.build_trainable(plain, config_of(*NOWHERE, *options))
    assert table == finetune.TABLES["lora"]
    assert found.image_encoder.blocks[0].attn.qkv.lora_a.shape[1] == 3
    for name in ("decoder", "hq", "everything"):
        found, table = finetune.build_trainable(plain, config_of(*NOWHERE, "--train", name))
        assert (found, table) == (plain, finetune.TABLES[name])


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "finetune")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SystemExit, match=r"^finetune: tensorboardX is not installed; run: "):
        importlib.import_module("finetune")
