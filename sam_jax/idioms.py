"""What people write who know `segment_anything`, `transformers` or PyTorch, and what to write here.

Idioms that can work do. For the others there is advice in the error; `docs/migrating.md` lists all.
"""

from typing import Any

_NO_DEVICES = "leave it out: JAX computes on the GPU or TPU that is there"
_NUMPY = "leave it out: the arrays are numpy's, which the model takes and moves itself"

# By class, then by attribute.
ADVICE = {
    "Sam": {
        **dict.fromkeys(("to", "cuda", "cpu"), _NO_DEVICES),
        **dict.fromkeys(
            ("half", "float", "bfloat16"), "use from_pretrained(name, dtype=jnp.bfloat16)"
        ),
        **dict.fromkeys(
            ("parameters", "named_parameters"),
            "use nnx.state(model, nnx.Param), or split_model(model, rules) of "
            "sam_jax.training.parameters to train",
        ),
        "requires_grad_": "use split_model(model, rules) of sam_jax.training.parameters",
        "zero_grad": "leave it out: jax.grad returns gradients",
        "state_dict": "use nnx.state(model), or save_pretrained(model, folder)",
        "load_state_dict": "use from_pretrained(path)",
        "save_pretrained": "use sam_jax.save_pretrained(model, folder)",
        "from_pretrained": "use sam_jax.from_pretrained(name)",
        "forward": "call the model: model(**inputs)",
        "preprocess": "use SamProcessor(model.config).normalize(image), of a resized uint8 image",
        "postprocess_masks": "use SamProcessor(model.config).post_process_masks",
        "vision_encoder": "use image_encoder, or get_image_embeddings(pixel_values)",
        "shared_image_embedding": "use get_image_wide_positional_embeddings()",
    },
    "ImageEncoderViT": {"img_size": "use model.config.image_size"},
    "TinyViT": {"img_size": "use model.config.image_size"},
    "PromptEncoder": {
        "embed_dim": "use model.config.prompt_embed_dim",
        "image_embedding_size": "use model.config.image_embedding_size, one number",
        "input_image_size": "use model.config.image_size, one number",
    },
    "SamPredictor": {
        "set_torch_image": "use set_image(image) with the image as it is, or set_image_embedding",
    },
    "SamAutomaticMaskGenerator": {
        "predictor": "make a SamPredictor(model)",
        "postprocess_small_regions": "give min_mask_region_area to the generator",
    },
    "SamProcessor": {
        "generate_crop_boxes": "use SamAutomaticMaskGenerator(model, crop_n_layers=...)",
        "filter_masks": "use SamAutomaticMaskGenerator(model, pred_iou_thresh=...)",
        "post_process_for_mask_generation": "use SamAutomaticMaskGenerator(model)",
        "target_size": "use processor.config.image_size",
        "size": "use processor.config.image_size",
    },
    "SamInputs": {"to": _NUMPY},
    "SamImageSegmentationOutput": {
        "to_tuple": "it is a tuple",
        "keys": "use its _fields",
        "to": _NO_DEVICES,
    },
    "MaskGenerationPipeline": {
        "image_processor": "use SamProcessor(pipeline.model.config)",
    },
    "pipeline": {
        **dict.fromkeys(("device", "device_map"), _NO_DEVICES),
        **dict.fromkeys(
            ("dtype", "torch_dtype"), "use model=from_pretrained(name, dtype=jnp.bfloat16)"
        ),
        "image_processor": "leave it out: the model's configuration has all that it needs",
        "batch_size": "leave it out: devices take an image each",
    },
    "sam_jax": {
        "sam_model_registry": "use from_pretrained(checkpoint)",
        **dict.fromkeys(
            ("build_sam", "build_sam_vit_h", "build_sam_vit_l", "build_sam_vit_b"),
            "use from_pretrained(checkpoint)",
        ),
        **dict.fromkeys(
            ("SamModel", "SamHQModel", "AutoModel", "AutoModelForMaskGeneration"),
            "use from_pretrained(name)",
        ),
        **dict.fromkeys(
            ("AutoProcessor", "SamImageProcessor", "SamHQProcessor"),
            "use SamProcessor.from_pretrained(name)",
        ),
        "ResizeLongestSide": "use SamPredictor(model).transform",
        "SamOnnxModel": "use sam-jax export --format onnx",
    },
}


class WithAdvice:
    """A class whose unknown attributes raise `unknown_attribute`."""

    def __getattr__(self, name: str) -> Any:
        raise unknown_attribute(self, name)


def unknown_attribute(owner: Any, name: str) -> AttributeError:
    """The error for an attribute that is not there, with advice where it has a counterpart."""
    kind = type(owner).__name__
    advice = ADVICE.get(kind, {}).get(name)
    message = f"{kind!r} object has no attribute {name!r}"
    return AttributeError(f"{message}; {advice}" if advice else message, name=name, obj=owner)
