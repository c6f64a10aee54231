"""The PyTorch references, with random weights, and our model with the same weights.

`segment_anything` and `mobile_sam` import a few functions of torchvision and timm, which have no
CPU build on the package index or are not needed otherwise. Stand-ins are put in their place while
they are imported.
"""

import contextlib
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from PIL import Image

from sam_jax.checkpoints.params import build_model, param_shapes
from sam_jax.checkpoints.torch_names import from_torch
from sam_jax.config import (
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamConfig,
    TinyViTConfig,
    ViTConfig,
    to_hf,
)


def _resize(image, size):
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _batched_nms(boxes, scores, groups, iou_threshold):
    raise AssertionError("not needed by these tests")


def _module(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


_STAND_INS = [
    _module("torchvision"),
    _module("torchvision.transforms"),
    _module("torchvision.transforms.functional", resize=_resize, to_pil_image=Image.fromarray),
    _module("torchvision.ops"),
    _module("torchvision.ops.boxes", batched_nms=_batched_nms, box_area=_batched_nms),
    _module("timm"),
    _module("timm.models"),
    _module(
        "timm.models.layers",
        DropPath=torch.nn.Identity,
        to_2tuple=lambda x: (x, x),
        trunc_normal_=torch.nn.init.trunc_normal_,
    ),
    _module("timm.models.registry", register_model=lambda function: function),
]


@contextlib.contextmanager
def _stand_ins():
    names = [m.__name__ for m in _STAND_INS]
    saved = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update({m.__name__: m for m in _STAND_INS})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(saved)


with _stand_ins():
    segment_anything = importlib.import_module("segment_anything")
    mobile_sam = importlib.import_module("mobile_sam")

# Every feature at a small size: windows that need padding, several heads, two kinds of block.
SMALL = SamConfig(
    image_encoder=ViTConfig(
        embed_dim=48,
        depth=4,
        num_heads=3,
        mlp_dim=96,
        global_attn_indexes=(1, 3),
        patch_size=8,
        window_size=5,
    ),
    prompt_encoder=PromptEncoderConfig(mask_in_chans=8),
    mask_decoder=MaskDecoderConfig(num_heads=4, mlp_dim=64, iou_head_hidden_dim=24),
    image_size=96,
    prompt_embed_dim=32,
)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter and buffer random and none zero, at a scale that keeps activations sane."""
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
    for part in module.modules():  # MobileSAM keeps a copy of its attention biases
        if hasattr(part, "attention_bias_idxs"):
            part.ab = part.attention_biases[:, part.attention_bias_idxs].detach()
    return module.eval()


def meta_sam(config: SamConfig, seed: int = 0):
    """Meta's `Sam` of this configuration."""
    from functools import partial

    modeling = segment_anything.modeling
    vit, decoder, dim = config.image_encoder, config.mask_decoder, config.prompt_embed_dim
    grid = config.image_embedding_size
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=vit.depth,
            embed_dim=vit.embed_dim,
            img_size=config.image_size,
            mlp_ratio=vit.mlp_dim / vit.embed_dim,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=vit.num_heads,
            patch_size=vit.patch_size,
            use_rel_pos=True,
            global_attn_indexes=vit.global_attn_indexes,
            window_size=vit.window_size,
            out_chans=dim,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(grid, grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.prompt_encoder.mask_in_chans,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=decoder.num_multimask_outputs,
            transformer=modeling.TwoWayTransformer(
                depth=decoder.transformer_depth,
                embedding_dim=dim,
                mlp_dim=decoder.mlp_dim,
                num_heads=decoder.num_heads,
            ),
            transformer_dim=dim,
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        ),
    )
    return randomise(sam, seed)


def hf_sam(config: SamConfig, seed: int = 0) -> transformers.SamModel:
    """Hugging Face's `SamModel` of this configuration."""
    values = {k: v for k, v in to_hf(config).items() if k not in ("model_type", "architectures")}
    model = randomise(transformers.SamModel(transformers.SamConfig(**values)), seed)
    model.tie_weights()
    return model


def mobile_sam_torch(checkpoint=None, seed: int = 0):
    """MobileSAM's `Sam`, with random weights or with a checkpoint's."""
    sam = mobile_sam.sam_model_registry["vit_t"]()
    if checkpoint is None:
        return randomise(sam, seed)
    sam.load_state_dict(torch.load(checkpoint, weights_only=True))
    return sam.eval()


def ours(module: torch.nn.Module, config: SamConfig, **options):
    """Our model with the weights of a PyTorch one."""
    tensors = {k: v.detach().numpy() for k, v in module.state_dict().items()}
    params = from_torch(tensors, config, param_shapes(config))
    return build_model(params, config, **options)


def run(module, *args, method: str = "__call__"):
    """Calls a method of one of our modules, compiled."""
    graphdef, state = nnx.split(module)

    @jax.jit
    def call(state, *args):
        return getattr(nnx.merge(graphdef, state), method)(*args)

    return call(state, *args)


MOBILE = SamConfig(TinyViTConfig())


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


def mask_iou(actual, expected) -> np.ndarray:
    """IoU of boolean masks over their last two axes; 1 where both are empty."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    both = (actual & expected).sum((-2, -1))
    either = (actual | expected).sum((-2, -1))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))
