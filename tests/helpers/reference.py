"""The PyTorch references with random weights, and sam_jax's models with the same weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_reference
import transformers
from flax import nnx

from sam_jax.checkpoints.names import from_torch, torch_name
from sam_jax.checkpoints.params import build_model, param_shapes
from sam_jax.config import (
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamConfig,
    TinyViTConfig,
    ViTConfig,
)
from sam_jax.models.layers import LayerNorm

# Every feature at a small size: windows that need padding, several heads, two kinds of block.
SMALL = SamConfig(
    image_encoder=ViTConfig(
        embed_dim=48,
        depth=2,
        num_heads=3,
        mlp_dim=96,
        global_attn_indexes=(1,),
        patch_size=8,
        window_size=5,
    ),
    prompt_encoder=PromptEncoderConfig(mask_in_chans=16),
    mask_decoder=MaskDecoderConfig(num_heads=4, mlp_dim=64, iou_head_hidden_dim=24),
    image_size=96,
    prompt_embed_dim=32,
)

# One block and one layer, for tests that need no depth: gradients compile slowly.
SHALLOW = dataclasses.replace(
    SMALL,
    image_encoder=dataclasses.replace(SMALL.image_encoder, depth=1, global_attn_indexes=()),
    mask_decoder=dataclasses.replace(SMALL.mask_decoder, transformer_depth=1, iou_head_depth=2),
)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Makes every parameter and buffer random and nonzero, and keeps activations moderate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or name.startswith("pixel_"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif ("norm" in name and name.endswith("weight")) or name.endswith("bn.weight"):
                tensor.copy_(1 + 0.1 * noise)
            elif tensor.ndim >= 2 and name.endswith("weight") and "embed." not in name:
                tensor.copy_(noise / max(tensor[0].numel(), 1) ** 0.5)
            elif "gaussian" in name or "positional_embedding" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(0.2 * noise)
    return module.eval()  # MobileSAM copies its attention biases in this call


def meta_sam(config: SamConfig, seed: int = 0):
    """Meta's `Sam` of this configuration, or MobileSAM's."""
    return randomize(torch_reference.meta_sam(config), seed)


def hf_sam(config: SamConfig, seed: int = 0) -> transformers.SamModel:
    """Hugging Face's `SamModel` of this configuration."""
    model = randomize(torch_reference.hf_sam(config), seed)
    model.tie_weights()
    return model


def mobile_sam_torch(checkpoint):
    """MobileSAM's `Sam` with the weights of a checkpoint."""
    sam = torch_reference.meta_sam(MOBILE)
    sam.load_state_dict(torch.load(checkpoint, weights_only=True))
    return sam.eval()


def ours(module: torch.nn.Module, config: SamConfig, **options):
    """A sam_jax model with the weights of a PyTorch model."""
    tensors = {k: v.detach().numpy() for k, v in module.state_dict().items()}
    params = from_torch(tensors, config, param_shapes(config))
    return build_model(params, config, **options)


def random_sam(config: SamConfig):
    """A sam_jax model with random weights, which needs no reference.

    NumPy draws them, since `Sam(config, rngs=...)` compiles a program for each shape.
    """
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in param_shapes(config).items():
        noise, kind = rng.normal(size=shape).astype(np.float32), path.rsplit(".", 1)[-1]
        if kind == "kernel":
            params[path] = noise / max(np.prod(shape[:-1]), 1) ** 0.5
        elif kind in ("scale", "var"):
            params[path] = np.abs(1 + 0.1 * noise)
        else:
            params[path] = 0.2 * noise
    return build_model(params, config)


def run(module, *args, method: str = "__call__", **kwargs):
    """Compiles and calls a method of a sam_jax module."""
    graphdef, state = nnx.split(module)

    @jax.jit
    def call(state, args, kwargs):
        return getattr(nnx.merge(graphdef, state), method)(*args, **kwargs)

    return call(state, args, kwargs)


MOBILE = SamConfig(TinyViTConfig())

# The reference keeps the grid after a stage only if the next is 320 wide.
SMALL_TINY = dataclasses.replace(
    SMALL,
    image_encoder=TinyViTConfig(
        embed_dims=(16, 32, 48, 320),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 3, 10),
        window_sizes=(7, 7, 14, 7),
        num_classes=10,
    ),
    image_size=256,
    prompt_embed_dim=256,
)

# For tests that do not depend on the size of the TinyViT. It has no reference.
TINIEST = dataclasses.replace(
    SHALLOW,
    image_encoder=TinyViTConfig(
        embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=None
    ),
    image_size=64,
)


def normal(shape, seed: int = 0, scale: float = 1.0) -> jax.Array:
    """Random float32 numbers."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tensor(array) -> torch.Tensor:
    """The same numbers in PyTorch."""
    return torch.tensor(np.asarray(array))


def to_torch(array) -> torch.Tensor:
    """Channels last [..., h, w, c] -> [..., c, h, w]."""
    return tensor(np.moveaxis(np.asarray(array), -1, -3))


def from_torch_image(tensor: torch.Tensor) -> np.ndarray:
    """[..., c, h, w] -> channels last."""
    return np.moveaxis(tensor.detach().numpy(), -3, -1)


def torch_encode(sam, pixels):
    """Runs Meta's image encoder, or MobileSAM's, whose own forward requires 1024 pixels."""
    encoder = sam.image_encoder
    if not hasattr(encoder, "forward_features"):
        return encoder(pixels)
    x = encoder.patch_embed(pixels)
    for layer in encoder.layers:
        x = layer(x)
    side = pixels.shape[-1] // 16
    return encoder.neck(x.reshape(len(x), side, side, -1).permute(0, 3, 1, 2))


def assert_close(actual: jax.Array | np.ndarray, expected, tolerance: float = 1e-5) -> None:
    """The largest difference is at most `tolerance` of the largest expected value."""
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().numpy()
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = np.abs(expected).max()
    assert np.isfinite(expected).all()
    assert scale > 0
    difference = np.abs(actual - expected).max() / scale
    assert difference <= tolerance, f"largest difference {difference:.2e} of the largest value"


def assert_same_epsilons(model, reference: torch.nn.Module) -> None:
    """Compares the epsilons of all norms of a model and its reference."""
    norms = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, LayerNorm)
    }
    assert len(norms) > 10
    for path, norm in norms.items():
        name, _ = torch_name(f"{path}.scale", model.config, "meta")
        assert norm.eps == reference.get_submodule(name.removesuffix(".weight")).eps, path


def mask_iou(actual, expected) -> np.ndarray:
    """IoU of boolean masks over their last two axes; 1 where both are empty."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    both = (actual & expected).sum((-2, -1))
    either = (actual | expected).sum((-2, -1))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def lowered_for_cuda(function, *shapes, **static) -> str:
    """The StableHLO of a jitted function for an NVIDIA GPU."""
    return function.trace(*shapes, **static).lower(lowering_platforms=("cuda",)).as_text()


def flash_attentions(text: str) -> dict[str, tuple[int, int]]:
    """How many flash attentions of each kind there are, forward and backward."""
    patterns = {
        "cudnn": (r"__cudnn\$fmhaSoftmax\b", r"__cudnn\$fmhaSoftmaxBackward\b"),
        "pallas": ('name = "flash_attention"', 'name = "flash_attention_backward_keys"'),
    }
    found = {
        kind: tuple(len(re.findall(pattern, text)) for pattern in both)
        for kind, both in patterns.items()
    }
    return {kind: counts for kind, counts in found.items() if any(counts)}
