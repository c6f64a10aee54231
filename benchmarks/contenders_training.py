"""The training steps that `benchmarks.run` compares: sam_jax's and PyTorch's."""

import copy
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.setting import Contenders, Setting, torch, torch_loss
from sam_jax.models.layers import split_keys
from sam_jax.training.interactive import _first_prompt
from sam_jax.training.rules import EVERYTHING, adamw, partition
from sam_jax.training.step import TrainConfig, compile_step, init_state

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.1


def training(setting: Setting) -> Contenders:
    """A step of AdamW on all parameters, one object per image; the losses of two steps."""
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": setting.random(setting.batch, 1024, 1024, 3),
        "masks": np.zeros((setting.batch, 1, 256, 256), bool),
        "boxes": np.tile(np.array([40.0, 40.0, 399.0, 799.0], np.float32), (setting.batch, 1, 1)),
        "valid": np.ones((setting.batch, 1), np.float32),
    }
    batch["masks"][..., 10:200, 10:100] = rng.random((190, 90)) > 0.2
    key, config = jax.random.key(0), TrainConfig(box_probability=1.0)
    on_device = jax.tree.map(jnp.asarray, batch)

    def ours(model):
        tx = adamw(LEARNING_RATE, EVERYTHING, weight_decay=WEIGHT_DECAY)
        trained, rest = partition(model, EVERYTHING)
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

    if setting.dtype != "float32":
        sam = copy.deepcopy(setting.meta)
        add("Meta, float32", sam, meta_forward(sam), "float32")
    # On a CPU, errors of compiled decoders' gradients exceed the gradients (PyTorch 2.13).
    decoders = setting.device != "cpu"
    for compiled in setting.variants:
        sam = copy.deepcopy(setting.meta)
        if compiled:
            sam.image_encoder = setting.compile(sam.image_encoder)
            if decoders:  # the method, which the step calls
                sam.mask_decoder.predict_masks = setting.compile(sam.mask_decoder.predict_masks)
        add("Meta, torch.compile" if compiled else "Meta", sam, meta_forward(sam), setting.dtype)
    for compiled in setting.variants if setting.is_vit else ():
        model = copy.deepcopy(setting.hugging_face)
        if compiled:
            model.vision_encoder = setting.compile(model.vision_encoder)
            if decoders:
                model.mask_decoder = setting.compile(model.mask_decoder)
        who = "transformers, torch.compile" if compiled else "transformers, SDPA"
        add(who, model, hugging_face_forward(model), setting.dtype)
    return found


def meta_forward(sam: "torch.nn.Module") -> Callable:
    """Logits [b, 4, h, w] and scores [b, 4] for pixels and one box per image [b, 4]."""

    def forward(pixels, boxes):
        image_pe, found = sam.prompt_encoder.get_dense_pe(), []
        for embedding, box in zip(sam.image_encoder(pixels), boxes, strict=True):
            # Its decoder takes one image.
            prompt = sam.prompt_encoder(points=None, boxes=box[None], masks=None)
            found.append(sam.mask_decoder.predict_masks(embedding[None], image_pe, *prompt))
        return (torch.cat(x) for x in zip(*found, strict=True))

    return forward


def hugging_face_forward(model: "torch.nn.Module") -> Callable:
    """The same by `SamModel`, which returns either the first mask or the others."""

    def forward(pixels, boxes):
        embeddings = model.vision_encoder(pixels).last_hidden_state
        image_pe = model.get_image_wide_positional_embeddings().repeat(len(pixels), 1, 1, 1)
        prompt = model.prompt_encoder(None, None, boxes[:, None], None)
        found = model.mask_decoder(embeddings, image_pe, *prompt, multimask_output=False)
        return (x[:, 0] for x in found)

    return forward


def torch_step(
    setting: Setting, sam: "torch.nn.Module", forward: Callable, batch: dict, key, dtype: str
) -> Callable:
    """The same step in PyTorch, with the boxes that sam_jax draws at random in each step."""
    for module in sam.modules():
        # It caches its biases unless it trains. Batch norms keep their statistics, as in sam_jax.
        module.training = hasattr(module, "attention_bias_idxs")
    kinds = torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d
    kernels = {id(m.weight) for m in sam.modules() if isinstance(m, kinds)}
    groups = [
        {"params": [p for p in sam.parameters() if (id(p) in kernels) is decays], "weight_decay": w}
        for decays, w in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    pixels = setting.tensor(batch["pixel_values"]).permute(0, 3, 1, 2).contiguous()
    targets = setting.tensor(batch["masks"][:, 0]).float()
    steps = itertools.count()

    @jax.jit
    def draw_boxes(step, masks, boxes):
        keys = jax.random.split(jax.random.fold_in(key, step), setting.batch)

        def one(key, mask, box):
            object_key = jax.random.split(jax.random.split(key, 1)[0], 3)[0]
            return _first_prompt(object_key, mask, box, 1024, 1.0)[0].reshape(4)

        prompt_keys, _ = split_keys(keys, 2)
        return jax.vmap(one)(prompt_keys, masks, boxes)

    def run():
        boxes = draw_boxes(next(steps), batch["masks"][:, 0], batch["boxes"][:, 0])
        boxes = setting.tensor(np.array(boxes))
        with (
            torch.enable_grad(),
            torch.autocast(setting.device, setting.torch_dtype, enabled=dtype != "float32"),
        ):
            logits, scores = forward(pixels, boxes)
            # A box is not ambiguous: the first mask is for it.
            first = (torch.arange(logits.shape[1], device=setting.device) == 0)[None]
            loss = torch_loss(logits.double(), scores.double(), targets.double(), first).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run
