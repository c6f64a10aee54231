"""The training steps that `benchmarks.run` compares: sam_jax's and PyTorch's."""

import copy
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.setting import Contenders, Setting, torch, torch_loss
from sam_jax.models.layers import split_keys
from sam_jax.training.interactive import first_prompt
from sam_jax.training.rules import DECODER_ONLY, EVERYTHING, Table, adamw, partition
from sam_jax.training.step import TrainConfig, compile_step, init_state

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.1


def training(setting: Setting) -> Contenders:
    """A step of AdamW on all parameters, one object per image; the losses of two steps."""
    pixels = setting.random(setting.batch, 1024, 1024, 3)
    return steps(setting, {"pixel_values": pixels}, EVERYTHING, objects=1)


def decoder_training(setting: Setting) -> Contenders:
    """The same for the mask decoder alone, with embeddings of the images, eight objects each."""
    embeddings = setting.random(setting.batch, 64, 64, 256)
    return steps(setting, {"image_embedding": embeddings}, DECODER_ONLY, objects=8)


def steps(
    setting: Setting, images: dict[str, np.ndarray], table: Table, *, objects: int
) -> Contenders:
    shape = setting.batch, objects
    batch = {
        **images,
        "masks": np.zeros((*shape, 256, 256), bool),
        "boxes": np.tile(np.array([40.0, 40.0, 399.0, 799.0], np.float32), (*shape, 1)),
        "valid": np.ones(shape, np.float32),
    }
    batch["masks"][..., 10:200, 10:100] = np.random.default_rng(0).random((190, 90)) > 0.2
    key, config = jax.random.key(0), TrainConfig(box_probability=1.0)
    on_device = jax.tree.map(jnp.asarray, batch)

    def ours(model):
        tx = adamw(LEARNING_RATE, table, weight_decay=WEIGHT_DECAY)
        trained, rest = partition(model, table)
        state = init_state(trained, tx)
        step = compile_step(state, tx, config=config)

        def run():
            nonlocal state
            state, metrics = step(state, rest, on_device, key)
            return metrics["loss"]

        return run

    return setting.with_ours(torch_steps(setting, batch, key) if torch else {}, ours)


def torch_steps(setting: Setting, batch: dict, key) -> Contenders:
    found: Contenders = {}

    def add(who, sam, forward, dtype):
        found[who] = torch_step(setting, sam, forward, batch, key, dtype)

    cached = "image_embedding" in batch
    if setting.dtype != "float32":
        sam = copy.deepcopy(setting.meta)
        add("Meta, float32", sam, meta_forward(sam, cached), "float32")
    # On a CPU, errors of compiled decoders' gradients exceed the gradients (PyTorch 2.13).
    decoders = setting.device != "cpu"
    variants = (False,) if cached and not decoders else setting.variants
    for compiled in variants:
        sam = copy.deepcopy(setting.meta)
        if compiled:
            sam.image_encoder = setting.compile(sam.image_encoder)
            if decoders:  # the method, which the step calls
                sam.mask_decoder.predict_masks = setting.compile(sam.mask_decoder.predict_masks)
        who = "Meta, torch.compile" if compiled else "Meta"
        add(who, sam, meta_forward(sam, cached), setting.dtype)
    for compiled in variants if setting.is_vit else ():
        model = copy.deepcopy(setting.hugging_face)
        if compiled:
            model.vision_encoder = setting.compile(model.vision_encoder)
            if decoders:
                model.mask_decoder = setting.compile(model.mask_decoder)
        who = "transformers, torch.compile" if compiled else "transformers, SDPA"
        add(who, model, hugging_face_forward(model, cached), setting.dtype)
    return found


def meta_forward(sam: "torch.nn.Module", cached: bool) -> Callable:
    """Logits [b * n, 4, h, w] and scores [b * n, 4] for images and boxes [b, n, 4].

    The images are pixels or, if they are cached, embeddings.
    """

    def forward(images, boxes):
        embeddings = images if cached else sam.image_encoder(images)
        image_pe, found = sam.prompt_encoder.get_dense_pe(), []
        for embedding, of_image in zip(embeddings, boxes, strict=True):
            # Its decoder takes one image.
            prompt = sam.prompt_encoder(points=None, boxes=of_image, masks=None)
            found.append(sam.mask_decoder.predict_masks(embedding[None], image_pe, *prompt))
        return (torch.cat(x) for x in zip(*found, strict=True))

    return forward


def hugging_face_forward(model: "torch.nn.Module", cached: bool) -> Callable:
    """The same by `SamModel`, which returns either the first mask or the others."""

    def forward(images, boxes):
        embeddings = images if cached else model.vision_encoder(images).last_hidden_state
        image_pe = model.get_image_wide_positional_embeddings().repeat(len(embeddings), 1, 1, 1)
        prompt = model.prompt_encoder(None, None, boxes, None)
        found = model.mask_decoder(embeddings, image_pe, *prompt, multimask_output=False)
        return (x.flatten(0, 1) for x in found)

    return forward


def torch_step(
    setting: Setting, sam: "torch.nn.Module", forward: Callable, batch: dict, key, dtype: str
) -> Callable:
    """The same step in PyTorch, with the boxes that sam_jax draws at random in each step."""
    for module in sam.modules():
        # It caches its biases unless it trains. Batch norms keep their statistics, as in sam_jax.
        module.training = hasattr(module, "attention_bias_idxs")
    if "image_embedding" in batch:
        sam.requires_grad_(False)
        sam.mask_decoder.requires_grad_(True)
    kinds = torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d
    kernels = {id(m.weight) for m in sam.modules() if isinstance(m, kinds)}
    trained = [p for p in sam.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (id(p) in kernels) is decays], "weight_decay": decay}
        for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    (images,) = (batch[name] for name in ("pixel_values", "image_embedding") if name in batch)
    images = setting.tensor(images).permute(0, 3, 1, 2).contiguous()
    targets = setting.tensor(batch["masks"]).float().flatten(0, 1)
    numbers = itertools.count()

    @jax.jit
    def draw_boxes(step, masks, boxes):
        keys = jax.random.split(jax.random.fold_in(key, step), setting.batch)

        def one_object(key, mask, box):
            return first_prompt(jax.random.split(key, 3)[0], mask, box, 1024, 1.0)[0].reshape(4)

        def one_image(key, masks, boxes):
            return jax.vmap(one_object)(jax.random.split(key, len(masks)), masks, boxes)

        prompt_keys, _ = split_keys(keys, 2)
        return jax.vmap(one_image)(prompt_keys, masks, boxes)

    def run():
        boxes = draw_boxes(next(numbers), batch["masks"], batch["boxes"])
        boxes = setting.tensor(np.array(boxes))
        with (
            torch.enable_grad(),
            torch.autocast(setting.device, setting.torch_dtype, enabled=dtype != "float32"),
        ):
            logits, scores = forward(images, boxes)
            # A box is not ambiguous: the first mask is for it.
            first = (torch.arange(logits.shape[1], device=setting.device) == 0)[None]
            loss = torch_loss(logits.double(), scores.double(), targets.double(), first).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run
