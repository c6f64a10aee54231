import dataclasses
import json

import jax.numpy as jnp
import pytest
from flax import nnx
from reference import SHALLOW, SMALL_TINY

from sam_jax import Sam
from sam_jax.export.common import vit_blocks, with_attention, write_config

CONFIG = dataclasses.replace(SHALLOW, normalization="min_max", resize="square")


@pytest.fixture
def model():
    return nnx.eval_shape(lambda: Sam(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


def test_the_config_says_how_to_preprocess(model, tmp_path):
    """Programs that run the export have no other source for it."""
    write_config(tmp_path, model, platforms=["cpu"])
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("platforms") == ["cpu"]
    assert written.pop("dtype") == "bfloat16"
    assert written.pop("mask_size") == CONFIG.mask_size
    settings = json.loads(json.dumps(CONFIG.to_dict()))
    assert written == {name: settings[name] for name in written}
    assert {"image_size", "resize", "normalization", "pixel_mean", "pixel_std"} < written.keys()


@pytest.mark.slow
def test_another_attention_changes_only_a_copy(model):
    before = [block.attn.implementation for block in vit_blocks(model)]
    chosen = [block.attn.implementation for block in vit_blocks(with_attention(model, "xla"))]
    assert chosen == ["xla"] * CONFIG.image_encoder.depth
    assert [block.attn.implementation for block in vit_blocks(model)] == before != chosen
    assert vit_blocks(nnx.eval_shape(lambda: Sam(SMALL_TINY, rngs=nnx.Rngs(0)))) == []
