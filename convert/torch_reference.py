"""The PyTorch references, for `--verify` and for the tests.

`segment_anything` and `mobile_sam` import a few functions of torchvision and timm, which are not
part of the models. If these packages are not installed, stand-ins replace them during the import.
"""

import contextlib
import importlib
import sys
import types
from functools import partial

import torch
from PIL import Image

from sam_jax.config import SamConfig, ViTConfig


def _resize(image, size):
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _box_area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _batched_nms(boxes, scores, categories, iou_threshold):
    """Plain version of torchvision's function on a CPU; all `categories` must be 0."""
    assert not categories.any()
    areas, order, kept = _box_area(boxes), scores.sort(stable=True, descending=True)[1], []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        corner0 = torch.maximum(boxes[best, :2], boxes[order, :2])
        corner1 = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        intersection = (corner1 - corner0).clamp(min=0).prod(1)
        iou = intersection / (areas[best] + areas[order] - intersection)
        # In C++ the threshold is a double.
        order = order[~(iou.double() > iou_threshold)]
    return torch.stack(kept) if kept else order


_STAND_INS = {
    "torchvision": {},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"resize": _resize, "to_pil_image": Image.fromarray},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": _batched_nms, "box_area": _box_area},
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {
        # The models are only used in evaluation mode, where DropPath does nothing.
        "DropPath": type("DropPath", (torch.nn.Identity,), {}),
        "to_2tuple": lambda x: (x, x),
        "trunc_normal_": torch.nn.init.trunc_normal_,
    },
    "timm.models.registry": {"register_model": lambda function: function},
}


@contextlib.contextmanager
def _stand_ins():
    added = []
    for name, members in _STAND_INS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__dict__.update(members)
            sys.modules[name] = module
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def import_reference(name: str) -> types.ModuleType:
    """Imports `segment_anything`, `mobile_sam` or `segment_anything_hq`."""
    with _stand_ins():
        return importlib.import_module(name)


def meta_sam(config: SamConfig) -> torch.nn.Module:
    """Meta's, MobileSAM's or SAM-HQ's `Sam` with this configuration; its weights are not set."""
    decoder, dim, grid = config.mask_decoder, config.prompt_embed_dim, config.image_embedding_size
    vit = isinstance(config.image_encoder, ViTConfig)
    package = "segment_anything" if vit else "mobile_sam"
    modeling = import_reference("segment_anything_hq" if config.hq else package).modeling
    make_decoder = modeling.MaskDecoder
    if config.hq:
        make_decoder = partial(modeling.MaskDecoderHQ, vit_dim=config.image_encoder.early_dim)
    return modeling.Sam(
        image_encoder=(_vit if vit else _tiny_vit)(modeling, config),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=dim,
            image_embedding_size=(grid, grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.prompt_encoder.mask_in_chans,
        ),
        mask_decoder=make_decoder(
            num_multimask_outputs=decoder.num_multimask_outputs,
            transformer=modeling.TwoWayTransformer(
                depth=decoder.transformer_depth,
                embedding_dim=dim,
                mlp_dim=decoder.mlp_dim,
                num_heads=decoder.num_heads,
                attention_downsample_rate=decoder.attention_downsample_rate,
            ),
            transformer_dim=dim,
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        ),
    ).eval()


def _vit(modeling, config: SamConfig) -> torch.nn.Module:
    vit = config.image_encoder
    return modeling.ImageEncoderViT(
        depth=vit.depth,
        embed_dim=vit.embed_dim,
        img_size=config.image_size,
        patch_size=vit.patch_size,
        mlp_ratio=vit.mlp_dim / vit.embed_dim,
        norm_layer=partial(torch.nn.LayerNorm, eps=vit.layer_norm_eps),
        num_heads=vit.num_heads,
        qkv_bias=vit.qkv_bias,
        use_rel_pos=vit.use_rel_pos,
        global_attn_indexes=vit.global_attn_indexes,
        window_size=vit.window_size,
        out_chans=config.prompt_embed_dim,
    )


def _tiny_vit(modeling, config: SamConfig) -> torch.nn.Module:
    tiny = config.image_encoder
    return modeling.TinyViT(
        img_size=config.image_size,
        num_classes=tiny.num_classes,
        embed_dims=tiny.embed_dims,
        depths=tiny.depths,
        num_heads=tiny.num_heads,
        window_sizes=tiny.window_sizes,
        mlp_ratio=tiny.mlp_ratio,
        mbconv_expand_ratio=tiny.mbconv_expand_ratio,
    )


def hf_sam(config: SamConfig) -> torch.nn.Module:
    """Hugging Face's `SamModel` or `SamHQModel` with this configuration and random weights."""
    import transformers

    from sam_jax.checkpoints.hf_config import to_hf  # imports JAX, which other models do not need

    values = {k: v for k, v in to_hf(config).items() if k.endswith("_config")}
    if config.hq:
        return transformers.SamHQModel(transformers.SamHQConfig(**values)).eval()
    return transformers.SamModel(transformers.SamConfig(**values)).eval()


def hf_mask_generation(model: torch.nn.Module, processor, **options):
    """Hugging Face's pipeline, with a stand-in for torchvision's non-maximum suppression."""
    import transformers
    from transformers.models.sam.image_processing_pil_sam import _rle_to_mask

    def suppress(rles, scores, boxes, threshold):
        kept = _batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), threshold)
        rles = [rles[i] for i in kept]
        return [_rle_to_mask(rle) for rle in rles], scores[kept], rles, boxes[kept]

    processor.post_process_for_mask_generation = suppress
    return transformers.pipeline(
        "mask-generation", model=model, image_processor=processor, **options
    )
