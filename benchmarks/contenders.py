"""The functions that `benchmarks.run` compares: sam_jax and PyTorch, part by part.

PyTorch's contenders are Meta's code, `transformers` with its fused attention ("SDPA"), and the two
parts of segment-anything-fast, its compiled encoder and everything mode; on request also the others
under torch.compile, and Meta's encoder and decoder in ONNX Runtime and OpenVINO
(`benchmarks.rivals`). If a package that they need is missing, only sam_jax runs. The extra `test`
has all packages except segment-anything-fast, without which only its contenders are left out. (It
is pytorch-labs' project on GitHub; PyPI has another one of this name.)

All contenders have the same weights and inputs, which are random for encoder and decoder. Below
float32, the first contender still computes in float32; all other outputs are compared with its.
"""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from pycocotools.mask import frPyObjects

from benchmarks.common import RANDOM_ENCODER, VITS, model_of, photos
from benchmarks.contenders_training import decoder_training, training
from benchmarks.setting import (
    Contenders,
    Setting,
    hf_mask_generation,
    import_reference,
    rivals,
    torch,
)
from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.export import export_onnx
from sam_jax.export.openvino import OpenVinoEncoder
from sam_jax.models.compiled import decode, encode_image
from sam_jax.ops.attention import rel_pos_attention
from sam_jax.ops.prompts import join_prompts
from sam_jax.predictor import SamPredictor

PROMPTS = 64


def encoder(setting: Setting) -> Contenders:
    """Image embeddings of normalized pixels."""
    pixels = setting.random(setting.batch, 1024, 1024, 3)
    on_device = jnp.asarray(pixels)

    def ours(model):
        graphdef, params = nnx.split(model)
        return lambda: jnp.moveaxis(encode_image(graphdef, params, on_device), -1, 1)

    def in_openvino(model):
        run = OpenVinoEncoder(model)
        return lambda: np.moveaxis(run(pixels), -1, 1)

    theirs = torch_encoders(setting, pixels) if torch else {}
    found = setting.with_ours(theirs, ours, in_openvino)
    return found | (exported_encoders(setting, pixels) if torch else {})


def exported_encoders(setting: Setting, pixels: np.ndarray) -> Contenders:
    """What `export_onnx` writes, in each runtime."""
    model, found = model_of(setting.name), {}
    mean, std = (np.array(x, np.float32) for x in (model.config.pixel_mean, model.config.pixel_std))
    image = pixels[0] * std + mean
    with tempfile.TemporaryDirectory() as folder:
        if setting.runtimes and setting.batch == 1:
            export_onnx(model, Path(folder) / "onnx")
            for runtime in setting.runtimes:
                path = Path(folder) / "onnx" / "encoder.onnx"
                run = rivals.run_file(path, runtime, setting.dtype)
                found[f"our export, {runtime}"] = lambda run=run: run(image)[0]
    return found


def torch_encoders(setting: Setting, pixels: np.ndarray) -> Contenders:
    channels_first = setting.tensor(pixels).permute(0, 3, 1, 2).contiguous()
    modules: dict[str, tuple[torch.nn.Module, torch.dtype]] = {}
    if setting.dtype != "float32":
        modules["Meta, float32"] = setting.meta.image_encoder, torch.float32
    dtype = setting.torch_dtype
    fast = copy.deepcopy(setting.meta.image_encoder).to(dtype)
    modules["Meta"] = fast, dtype
    if setting.is_vit:
        sdpa = copy.deepcopy(setting.hugging_face.vision_encoder).to(dtype)
        modules["transformers, SDPA"] = sdpa, dtype
    if setting.compiled:
        modules["Meta, torch.compile"] = setting.compile(fast), dtype
        if setting.is_vit:
            modules["transformers, torch.compile"] = setting.compile(sdpa), dtype
    if setting.fast:
        modules["segment-anything-fast"] = setting.fast[1].image_encoder, dtype
    for runtime, (encoder, _) in setting.rivals.items():
        modules[f"Meta, {runtime}"] = encoder, torch.float32

    def run(module, dtype):
        inputs = channels_first.to(dtype)
        return lambda: getattr(result := module(inputs), "last_hidden_state", result)

    return {who: run(*module) for who, module in modules.items()}


def decoder(setting: Setting, prompts: int = PROMPTS) -> Contenders:
    """Low-resolution masks and scores of clicks on one image, three masks each."""
    embedding = setting.random(1, 64, 64, 256)
    clicks = np.random.default_rng(0).uniform(0, 1023, (prompts, 1, 2)).astype(np.float32)
    ones = np.ones((prompts, 1), np.int32)
    points, labels = join_prompts(clicks[None], ones[None], None)
    arguments = [jnp.asarray(x) for x in (embedding, points, labels)]

    def ours(model):
        state = nnx.split(model)
        return lambda: decode(*state, *arguments, None, multimask_output=True)[:2]

    theirs = torch_decoders(setting, embedding, clicks, ones) if torch else {}
    return setting.with_ours(theirs, ours)


def torch_decoders(setting: Setting, embedding, clicks, labels) -> Contenders:
    channels_first = setting.tensor(embedding).permute(0, 3, 1, 2).contiguous()
    clicked = setting.tensor(clicks), setting.tensor(labels)

    def run(module, dtype):
        prompts = setting.meta.prompt_encoder

        def call():
            sparse, dense = prompts(points=clicked, boxes=None, masks=None)
            return module(
                image_embeddings=channels_first.to(dtype),
                image_pe=prompts.get_dense_pe().to(dtype),
                sparse_prompt_embeddings=sparse.to(dtype),
                dense_prompt_embeddings=dense.to(dtype),
                multimask_output=True,
            )[:2]

        return call

    def run_hugging_face(module, dtype):
        model = setting.hugging_face
        points, labels = (x[None] for x in clicked)

        def call():
            sparse, dense = model.prompt_encoder(points, labels, None, None)
            return module(
                image_embeddings=channels_first.to(dtype),
                image_positional_embeddings=model.get_image_wide_positional_embeddings().to(dtype),
                sparse_prompt_embeddings=sparse.to(dtype),
                dense_prompt_embeddings=dense.to(dtype),
                multimask_output=True,
            )[:2]

        return call

    dtype = setting.torch_dtype
    fast = copy.deepcopy(setting.meta.mask_decoder).to(dtype)
    found: Contenders = {}
    if setting.dtype != "float32":
        found["Meta, float32"] = run(setting.meta.mask_decoder, torch.float32)
    found["Meta"] = run(fast, dtype)
    if setting.is_vit:
        sdpa = copy.deepcopy(setting.hugging_face.mask_decoder).to(dtype)
        found["transformers, SDPA"] = run_hugging_face(sdpa, dtype)
    if setting.compiled:
        found["Meta, torch.compile"] = run(setting.compile(fast), dtype)
        if setting.is_vit:
            found["transformers, torch.compile"] = run_hugging_face(setting.compile(sdpa), dtype)
    for runtime, (_, decoder) in setting.rivals.items():
        found[f"Meta, {runtime}"] = run(decoder, torch.float32)
    return found


def predict(setting: Setting) -> Contenders:
    """Full-size masks, scores and logits of a photo and a click, by `SamPredictor`."""
    photo, point, label = photos()["landscape 600x400"], np.array([[300, 180]]), np.array([1])

    def by(predictor):
        def run():
            predictor.set_image(photo)
            return predictor.predict(point, label)[1:]

        return run

    theirs = {
        who: in_dtype(by(import_reference("segment_anything").SamPredictor(sam)), setting, dtype)
        for who, sam, dtype in metas(setting)
    }
    for who, model in hugging_faces(setting):
        run = hugging_face_predict(setting, model, photo, point)
        theirs[who] = in_dtype(run, setting, setting.dtype)
    return setting.with_ours(
        theirs,
        lambda model: by(SamPredictor(model)),
        lambda model: by(SamPredictor(model, runtime="openvino")),
    )


def hugging_face_predict(
    setting: Setting, model: "torch.nn.Module", photo: np.ndarray, point: np.ndarray
) -> Callable:
    """The same by `SamProcessor` and `SamModel` of `transformers`."""
    from transformers import SamProcessor

    processor = SamProcessor(hugging_face_processor())

    def run():
        inputs = processor(photo, input_points=[[point.tolist()]], return_tensors="pt")
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        inputs = inputs.to(setting.device, torch.float32)
        outputs = model(**inputs)
        logits = outputs.pred_masks.cpu()
        processor.image_processor.post_process_masks(logits, *sizes)
        return outputs.iou_scores[0, 0], logits[0, 0]

    return run


def everything(setting: Setting) -> Contenders:
    """All masks of a photo, 32 x 32 points, as run lengths."""
    photo = photos()["landscape 600x400"]
    options = {"output_mode": "coco_rle"} | (RANDOM_ENCODER if setting.is_vit else {})

    def by(generator):
        return lambda: generator.generate(photo)

    def meta(sam):
        return import_reference("segment_anything").SamAutomaticMaskGenerator(sam, **options)

    theirs = {who: in_dtype(by(meta(sam)), setting, dtype) for who, sam, dtype in metas(setting)}
    for who, model in hugging_faces(setting):
        run = hugging_face_everything(setting, model, photo)
        theirs[who] = in_dtype(run, setting, setting.dtype)
    if torch and setting.fast:
        package, sam = setting.fast
        generator = package.SamAutomaticMaskGenerator(sam, process_batch_size=8, **options)
        theirs["segment-anything-fast"] = by(generator)

    def ours(model, runtime="jax"):
        return by(SamAutomaticMaskGenerator(model, runtime=runtime, **options))

    return setting.with_ours(theirs, ours, functools.partial(ours, runtime="openvino"))


def hugging_face_everything(
    setting: Setting, model: "torch.nn.Module", photo: np.ndarray
) -> Callable[[], list[dict]]:
    """The same by the pipeline of `transformers`."""
    generate = hf_mask_generation(model, hugging_face_processor(), device=setting.device)
    image = Image.fromarray(photo)

    def run():
        # The pipeline decodes all masks that it keeps, and also returns run lengths.
        found = generate(image, points_per_batch=64, output_rle_mask=True, **RANDOM_ENCODER)
        rles = found["rle_mask"]
        return [{"segmentation": frPyObjects(rle, *rle["size"])} for rle in rles]

    return run


def hugging_face_processor():
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    return SamImageProcessorPil()


def metas(setting: Setting) -> "Iterator[tuple[str, torch.nn.Module, str]]":
    """Meta's model and its dtype context, then the same with compiled encoder and decoder."""
    if torch is None:
        return
    if setting.dtype != "float32":
        yield "Meta, float32", setting.meta, "float32"
    for compiled in setting.variants:
        sam = copy.deepcopy(setting.meta)
        give_float32(sam.mask_decoder)
        if compiled:
            sam.image_encoder = setting.compile(sam.image_encoder, graphs=False)
            sam.mask_decoder = setting.compile(sam.mask_decoder, graphs=False)
        yield "Meta, torch.compile" if compiled else "Meta", sam, setting.dtype
    for runtime, (encoder, decoder) in setting.rivals.items():
        sam = copy.deepcopy(setting.meta)
        sam.image_encoder, sam.mask_decoder = encoder, decoder
        yield f"Meta, {runtime}", sam, "float32"


def hugging_faces(setting: Setting) -> "Iterator[tuple[str, torch.nn.Module]]":
    """`SamModel` of `transformers`, then the same with compiled encoder and decoder."""
    if torch is None or not setting.is_vit:
        return
    for compiled in setting.variants:
        model = copy.deepcopy(setting.hugging_face)
        give_float32(model.mask_decoder)
        if compiled:
            model.vision_encoder = setting.compile(model.vision_encoder, graphs=False)
            model.mask_decoder = setting.compile(model.mask_decoder, graphs=False)
        yield "transformers, torch.compile" if compiled else "transformers, SDPA", model


def give_float32(decoder: "torch.nn.Module") -> None:
    """Casts outputs to float32: PyTorch cannot convert bfloat16 to numpy."""
    decoder.register_forward_hook(lambda *x: tuple(out.float() for out in x[-1]))


def in_dtype(function: Callable, setting: Setting, dtype: str) -> Callable:
    """Runs the function under PyTorch's automatic mixed precision."""

    def run():
        enabled = dtype != "float32"
        with torch.autocast(setting.device, setting.torch_dtype, enabled=enabled):
            return function()

    return run


def layer(setting: Setting, *, windows: bool = False, gradients: bool = False) -> Contenders:
    """The attention of a ViT layer, over 64 x 64 positions or over an image's 25 windows.

    The first contender is sam_jax's "xla" in float32, which computes all logits and adds the
    positions to them.
    """
    vit = VITS[setting.name]().image_encoder
    size, batch = (vit.window_size, 25) if windows else (64, 1)
    shape = setting.batch * batch, vit.num_heads, size**2, vit.head_dim
    rng = np.random.default_rng(0)
    q, k, v, cotangent = rng.normal(size=(4, *shape)).astype(np.float32)
    tables = 0.2 * rng.normal(size=(2, 2 * size - 1, vit.head_dim)).astype(np.float32)

    def ours(implementation, dtype):
        def run(*arrays):
            q, k, v, *tables = arrays
            return rel_pos_attention(q, k, v, tuple(tables), (size, size), implementation)

        def both(weights, *arrays):
            return jax.vjp(run, *arrays)[1](weights)

        weights, *arrays = (jnp.asarray(x, dtype) for x in (cotangent, q, k, v, *tables))
        if gradients:
            return functools.partial(jax.jit(both), weights, *arrays)
        return functools.partial(jax.jit(run), *arrays)

    found = {"ours, xla, float32": ours("xla", jnp.float32), "ours": ours(None, setting.dtype)}
    for name in setting.attention:
        found[f"ours, {name}"] = ours(name, setting.dtype)
    if torch is None:
        return found

    weights, *tensors = (setting.tensor(x).to(setting.torch_dtype) for x in (cotangent, q, k, v))
    tensors += [setting.tensor(x).to(setting.torch_dtype) for x in tables]

    def sdpa(q, k, v, *tables):
        offsets = torch.arange(size)[:, None] - torch.arange(size)[None, :] + size - 1
        grid = q.reshape(*q.shape[:2], size, size, -1)
        rel_h = torch.einsum("bnhwd,hkd->bnhwk", grid, tables[0][offsets])
        rel_w = torch.einsum("bnhwd,wkd->bnhwk", grid, tables[1][offsets])
        bias = (rel_h[..., :, None] + rel_w[..., None, :]).reshape(*q.shape[:3], -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def theirs(function):
        def run():
            if not gradients:
                return function(*tensors)
            leaves = [x.detach().requires_grad_() for x in tensors]
            with torch.enable_grad():
                return torch.autograd.grad(function(*leaves), leaves, weights)

        return run

    found["PyTorch, SDPA"] = theirs(sdpa)
    if setting.compiled:
        found["PyTorch, torch.compile"] = theirs(setting.compile(sdpa, graphs=False))
    return found


PARTS = {
    "encoder": encoder,
    "decoder": decoder,
    "click": functools.partial(decoder, prompts=1),
    "predict": predict,
    "everything": everything,
    "training": training,
    "decoder_training": decoder_training,
}
LAYERS = {
    "global": layer,
    "global_gradients": functools.partial(layer, gradients=True),
    "windows": functools.partial(layer, windows=True),
    "windows_gradients": functools.partial(layer, windows=True, gradients=True),
}
