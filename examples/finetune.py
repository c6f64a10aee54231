r"""Fine-tunes SAM on a COCO instance file or a folder of SA-1B.

    python examples/finetune.py --annotations coco.json --images photos --output run --steps 500

Run again, the same command goes on where it was. `run/model` is the result, a folder for
`sam_jax.from_pretrained`; `run/metrics.jsonl` has a line for each step. The loop is short because
its parts are functions of `sam_jax.training`, for loops of your own.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from PIL import Image
from tqdm import tqdm

from sam_jax import SamPredictor, from_pretrained, save_pretrained
from sam_jax.folder import keep_settings
from sam_jax.training import checkpointing, parameters, sharding
from sam_jax.training.data import Prepare, batches, open_source
from sam_jax.training.embeddings import CachedEmbeddings
from sam_jax.training.evaluate import evaluate, middle, set_image
from sam_jax.training.log import MetricsLog
from sam_jax.training.lora import add_lora, merge_lora
from sam_jax.training.step import Recipe, compile_step, init_state
from sam_jax.visualize import overlay


@dataclass(frozen=True)
class Config:
    """Fine-tune SAM."""

    annotations: Path
    """A COCO instance file, or a folder of SA-1B."""
    output: Path
    """Folder for the run."""
    steps: int
    """Steps in all."""
    images: Path | None = None
    """The COCO file's folder of pictures."""
    eval_annotations: Path | None = None
    """Held-out pictures to evaluate on."""
    eval_images: Path | None = None
    """Their folder."""
    eval_every: int = 100
    """Steps between evaluations, which are also when a checkpoint is written."""
    model: str = "mobile_sam"
    """Short name, hub repository, file or folder."""
    seed: int = 0
    """Of the order of pictures and of all that is by chance."""
    train: Literal["decoder", "lora", "everything"] = "decoder"
    """What trains: the mask decoder; it and adapters in the image encoder; all parameters."""
    lora_rank: int = 4
    """Rank of the adapters."""
    layer_decay: float | None = None
    """Layer-wise decay of a ViT's learning rate, if everything trains."""
    batch_size: int = 4
    """Pictures per step, of all devices and hosts together."""
    max_objects: int = 8
    """Objects of a picture per step."""
    objects_at_once: int | None = None
    """Of a picture's objects, on a GPU or TPU, for less memory; all if left out."""
    rounds: int = 1
    """Prompts per object and step, each but the first a correction; the paper's are 11."""
    box_probability: float = 0.5
    """How often the first prompt is a box, not a point."""
    full_resolution: bool = False
    """Compare masks at the resolution of the model's input, not at that of its output."""
    flip: float = 0.0
    """How often a picture is mirrored."""
    scale_range: tuple[float, float] | None = None
    """Large-scale jitter; the paper's is 0.1 2.0."""
    learning_rate: float = 1e-4
    """Its highest, after the warm-up."""
    warmup: int = 20
    """Steps until then; from there on it falls like a cosine."""
    weight_decay: float = 0.01
    """Of kernels."""
    clip_norm: float = 1.0
    """Largest norm of the gradients."""
    ema_decay: float | None = None
    """Keep a moving average of the parameters, which then is the result."""
    accumulate: int = 1
    """Work on the batch in so many parts, for less memory."""
    remat: bool = False
    """Compute activations of the image encoder twice, for less memory."""
    drop_path_rate: float = 0.0
    """Stochastic depth of a ViT."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    parallelism: sharding.Parallelism = "data"
    """Whether every device has all parameters, or its share (fsdp)."""
    workers: int = 0
    """Processes that read pictures; 0 for threads."""
    hosts: tuple[str, int, int] | None = None
    """For several hosts: the first one's address and port, how many there are, which one this is.
    """


# What may be another when a run goes on.
FREE = {"output", "hosts", "workers", "parallelism", "eval_every"}


def main(config: Config) -> None:
    """Trains, evaluates, and writes the model."""
    if config.hosts is not None:
        jax.distributed.initialize(*config.hosts)
    first_host = jax.process_index() == 0
    config.output.mkdir(parents=True, exist_ok=True)
    if first_host:
        settings = {k: str(v) for k, v in dataclasses.asdict(config).items() if k not in FREE}
        has_results = (config.output / "checkpoints").exists()
        keep_settings(config.output / "settings.json", settings, has_results)

    model = from_pretrained(config.model, dtype=jnp.dtype(config.dtype))
    table = parameters.DECODER_ONLY
    if config.train == "lora":
        model = add_lora(
            model, r"image_encoder\..*\.(qkv|proj)", config.lora_rank, rngs=nnx.Rngs(config.seed)
        )
        table = [*parameters.LORA_ONLY[:1], *parameters.DECODER_ONLY]
    elif config.train == "everything":
        table = parameters.EVERYTHING
        if config.layer_decay is not None:
            table = parameters.layer_decay(model.config, config.layer_decay)

    source = open_source(config.annotations, config.images)
    held_out = None
    if config.eval_annotations is not None:
        held_out = open_source(config.eval_annotations, config.eval_images)
    size = model.config.image_size if config.full_resolution else model.config.mask_size
    prepare = Prepare(model.config, config.max_objects, size, config.flip, config.scale_range)
    if config.train == "decoder" and not prepare.augments:
        # The encoder does not change: each picture is encoded once.
        cache = config.output / "embeddings"
        with tqdm(desc="encoding", unit="image", disable=not first_host) as bar:
            source = CachedEmbeddings(source, model, cache, bar.update)
            held_out = held_out and CachedEmbeddings(held_out, model, cache, bar.update)

    mesh = sharding.make_mesh()
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup, config.steps // 2), config.steps
    )
    tx = parameters.adamw(
        schedule, table, weight_decay=config.weight_decay, clip_norm=config.clip_norm
    )
    recipe = Recipe(
        rounds=config.rounds,
        # What few objects need stays in a CPU's cache.
        objects_at_once=1 if jax.default_backend() == "cpu" else config.objects_at_once,
        box_probability=config.box_probability,
        remat=config.remat,
        drop_path_rate=config.drop_path_rate,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )
    graphdef, trained, frozen = parameters.split_model(model, table)
    state = init_state(trained, tx, ema=config.ema_decay is not None)
    state = sharding.put(state, mesh, config.parallelism)
    frozen = sharding.put(frozen, mesh, config.parallelism)

    def current():
        trained = state.params if state.ema is None else state.ema
        trained, rest = sharding.gather((trained, frozen), mesh)
        return nnx.merge(graphdef, *jax.tree.map(jnp.asarray, (trained, rest)))

    with checkpointing.open_checkpoints(config.output / "checkpoints") as checkpoints:
        state = checkpointing.load_state(checkpoints, state) or state
        start = int(state.step)
        train_step = compile_step(state, tx, recipe)
        data = batches(
            source,
            prepare,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            workers=config.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        log = MetricsLog(config.output, start) if first_host else None
        key = jax.random.key(config.seed)
        steps = range(start + 1, config.steps + 1)
        for step, batch in zip(bar := tqdm(steps, initial=start, total=config.steps), data):  # noqa: B905
            batch = sharding.put_batch(batch, mesh)
            state, metrics = train_step(graphdef, state, frozen, batch, key)
            metrics = {name: float(value) for name, value in metrics.items()}
            bar.set_postfix(loss=metrics["loss"], iou=metrics["iou_last"])
            due = step % config.eval_every == 0 or step == config.steps
            if due:
                model = current()
                if held_out is not None:
                    metrics |= evaluate(model, held_out)
                    bar.write(json.dumps({"step": step, **metrics}))
                    if log:
                        draw(model, held_out, config.output / "pictures" / f"{step:06}.png")
            if log:
                log.write(step, {**metrics, "learning_rate": float(schedule(step - 1))})
            if due:
                checkpointing.save_state(checkpoints, state, metrics.get("miou@1"))
        if log:
            log.close()
    result = config.output / "model"
    if first_host and not result.exists():
        save_pretrained(merge_lora(current()), result)
        print(result)


def draw(model, source, path: Path, count: int = 4) -> None:
    """Masks of one click in the middle of each object of a few pictures, side by side."""
    predictor, pictures = SamPredictor(model), []
    for i in range(min(count, len(source))):
        example = source[i]
        points = np.array([[middle(mask)] for mask in example["masks"]])
        set_image(predictor, example)
        masks, scores, _ = predictor.predict_batch(points, np.ones(points.shape[:2]))
        best = masks[np.arange(len(masks)), scores.argmax(1)]
        labels = np.ones(len(points), int)
        pictures.append(overlay(example["image"], best, points[:, 0], labels))
    path.parent.mkdir(exist_ok=True)
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    sheet.save(path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__.splitlines()[0]))
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"finetune: {error}")
