"""What users of `segment_anything`, `transformers` and PyTorch write, and what to write here.

Idioms that can work do; for others the error gives advice. `docs/migrating.md` lists all of them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_NO_DEVICES = "leave it out: JAX uses the GPU or TPU by itself"
_NUMPY = "leave it out: the model moves these numpy arrays to the device itself"

_DEVICES = dict.fromkeys(("to", "cuda", "cpu"), _NO_DEVICES)
_MODULE = {  # for the model and its three parts
    **_DEVICES,
    **dict.fromkeys(("half", "float", "bfloat16"), "use from_pretrained(name, dtype=jnp.bfloat16)"),
    **dict.fromkeys(
        ("parameters", "named_parameters"),
        "use nnx.state(model, nnx.Param), or sam_jax.partition(model) for gradients",
    ),
    "requires_grad_": "use sam_jax.partition(model, table)",
    "zero_grad": "leave it out: jax.grad returns gradients",
    "state_dict": "use nnx.state(model), or save_pretrained(model, folder)",
    "load_state_dict": "use from_pretrained(path)",
}
_STATES = "use model.image_encoder.hidden_states(pixel_values)"
_ATTENTION = "use model.decoder_attention, or attention_weights of the image encoder's blocks"
_STEPS = "leave it out: processor.resize(image) and processor.normalize(image) are the steps"

# By class for attributes, by function for arguments; then by name.
ADVICE = {
    "Sam": {
        **_MODULE,
        **dict.fromkeys(("pixel_mean", "pixel_std"), "use model.config.pixel_mean and pixel_std"),
        "save_pretrained": "use sam_jax.save_pretrained(model, folder)",
        "num_parameters": "use sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))",
        "from_pretrained": "use sam_jax.from_pretrained(name)",
        "forward": "call the model: model(**inputs)",
        "preprocess": "use SamProcessor(model.config).normalize(image) on a resized uint8 image",
        "postprocess_masks": "use SamProcessor(model.config).post_process_masks",
        "vision_encoder": "use image_encoder, or get_image_embeddings(pixel_values)",
        "shared_image_embedding": "use get_image_wide_positional_embeddings()",
    },
    "SamConfig": {
        "vision_config": "use config.image_encoder",
        "mask_decoder_config": "use config.mask_decoder",
        "prompt_encoder_config": "use config.prompt_encoder",
    },
    "Sam.__call__": {
        "return_dict": "leave it out: the outputs are a named tuple",
        "output_hidden_states": _STATES,
        "output_attentions": _ATTENTION,
    },
    "ImageEncoderViT": {**_MODULE, "img_size": "use model.config.image_size"},
    "TinyViT": {**_MODULE, "img_size": "use model.config.image_size"},
    "MaskDecoder": _MODULE,
    "PromptEncoder": {
        **_MODULE,
        "embed_dim": "use model.config.prompt_embed_dim",
        "image_embedding_size": "use model.config.image_embedding_size, one number",
        "input_image_size": "use model.config.image_size, one number",
    },
    "SamPredictor": {
        **_DEVICES,
        "from_pretrained": "use SamPredictor(from_pretrained(name))",
        "set_torch_image": "use set_image(image) with the image as it is, or set_image_embedding",
    },
    "Transform": {
        "apply_image_torch": "use apply_image(image) on an image [h, w, 3]",
        "target_length": "use predictor.config.image_size",
        "get_preprocess_shape": "use predictor.processor.input_size((height, width))",
    },
    "SamAutomaticMaskGenerator": {
        **_DEVICES,
        "from_pretrained": "use SamAutomaticMaskGenerator(from_pretrained(name))",
        "predictor": "use SamPredictor(model)",
        "postprocess_small_regions": "pass min_mask_region_area to the generator",
    },
    "SamProcessor.__call__": {
        "padding": "leave it out: ragged prompts are padded",
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_pad"), _STEPS),
    },
    "SamProcessor.post_process_masks": {
        "return_tensors": "leave it out: the masks are numpy arrays",
        "pad_size": "leave it out: it is the model's",
    },
    "SamProcessor": {
        "save_pretrained": "use save_pretrained(model, folder), which also saves its configuration",
        "generate_crop_boxes": "use SamAutomaticMaskGenerator(model, crop_n_layers=...)",
        "filter_masks": "use SamAutomaticMaskGenerator(model, pred_iou_thresh=...)",
        "post_process_for_mask_generation": "use SamAutomaticMaskGenerator(model)",
        "target_size": "use processor.config.image_size",
        "size": "use processor.config.image_size",
    },
    "SamInputs": {"to": _NUMPY, "data": "leave it out: the inputs are a dictionary"},
    "SamImageSegmentationOutput": {
        "vision_hidden_states": _STATES,
        **dict.fromkeys(("vision_attentions", "mask_decoder_attentions"), _ATTENTION),
        "to_tuple": "it is a tuple",
        "to": _NO_DEVICES,
    },
    "MaskGenerationPipeline": {
        "device": "use pipe.model.device",
        "image_processor": "use SamProcessor(pipeline.model.config)",
    },
    "pipeline": {
        **dict.fromkeys(("device", "device_map"), _NO_DEVICES),
        **dict.fromkeys(
            ("dtype", "torch_dtype"), "use model=from_pretrained(name, dtype=jnp.bfloat16)"
        ),
        "image_processor": "leave it out: the model's configuration has its settings",
        "batch_size": "leave it out: each device processes one image at a time",
    },
    "sam_jax": {
        "sam_model_registry": "use from_pretrained(checkpoint)",
        **dict.fromkeys(
            ("build_sam", "build_sam_vit_h", "build_sam_vit_l", "build_sam_vit_b"),
            "use from_pretrained(checkpoint)",
        ),
        **dict.fromkeys(
            (
                *("SamModel", "SamHQModel", "SamVisionModel", "SamHQVisionModel"),
                *("AutoModel", "AutoModelForMaskGeneration"),
            ),
            "use from_pretrained(name)",
        ),
        **dict.fromkeys(
            ("AutoProcessor", "SamImageProcessor", "SamImageProcessorFast", "SamHQProcessor"),
            "use SamProcessor.from_pretrained(name)",
        ),
        "ResizeLongestSide": "use SamPredictor(model).transform",
        "SamOnnxModel": "use sam-jax export --format onnx",
    },
}


class WithAdvice:
    """A class whose unknown attributes raise `unknown_attribute`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Exists only to raise an error with advice.

        Raises:
            AttributeError: always; says what to write instead.
        """
        raise unknown_attribute(cls, "from_pretrained")

    def __getattr__(self, name: str) -> Any:
        raise unknown_attribute(self, name)


def unknown_attribute(owner: Any, name: str) -> AttributeError:
    """The error for an attribute that does not exist, with advice if it has a counterpart."""
    kind = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    message = f"{kind!r} object has no attribute {name!r}{_advice(kind, name)}"
    return AttributeError(message, name=name, obj=owner)


def with_advice(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wraps a method so that unknown keyword arguments raise a TypeError with advice."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        for name in kwargs:
            if name not in known:
                kind = f"{type(args[0]).__name__}.{function.__name__}"
                raise TypeError(f"{kind} has no argument {name!r}{_advice(kind, name)}")
        return function(*args, **kwargs)

    return call


def _advice(kind: str, name: str) -> str:
    advice = ADVICE.get(kind, {}).get(name)
    return f"; {advice}" if advice else ""
