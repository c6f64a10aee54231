r"""Fine-tunes SAM on a COCO instance file or a folder of SA-1B.

    python examples/finetune.py --annotations coco.json --images photos --output run --steps 500

Ctrl-C and SIGTERM save the state; rerun the same command to resume. `run/model` is the result, a
folder for `sam_jax.from_pretrained`. `run/metrics.jsonl` has a line for each step and, with
held-out images, one for step 0, before training. The parts of the loop are functions of
`sam_jax.training`, so you can write your own loop.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from sam_jax import SamConfig, from_pretrained, partition, save_pretrained
from sam_jax.checkpoints import flat_params, params_sha256
from sam_jax.evaluation import draw_clicks, evaluate
from sam_jax.runs import check_or_write_settings, lock_folder
from sam_jax.training import (
    TABLES,
    CachedEmbeddings,
    ExampleTransform,
    Interrupts,
    MetricsLog,
    OnBadAnnotation,
    OptimizerConfig,
    TrainConfig,
    add_lora,
    check_objects,
    checkpointing,
    compile_step,
    fingerprint,
    init_state,
    layer_decay,
    make_loader,
    merge_lora,
    open_annotations,
    read_metrics,
    save_lora,
    sharding,
    summarize_metrics,
    too_small,
    updates_made,
)

try:  # sam_jax imports these late, after the images are encoded
    import grain  # noqa: F401
    import tensorboardX  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(f'finetune: {error.name} is not installed; run: pip install "sam_jax[train]"')


@dataclass(frozen=True)
class Config:
    """Fine-tune SAM."""

    annotations: Path  # a COCO instance file, or a folder of SA-1B
    output: Path  # folder for the run
    steps: int  # number of steps in total
    images: Path | None = None  # folder of a COCO file's images
    eval_annotations: Path | None = None  # annotations of held-out images to evaluate on
    eval_images: Path | None = None  # folder of the held-out COCO file's images
    eval_every: int = 100  # steps between evaluations, each with a checkpoint
    # raise: list what is wrong with the annotations and stop; skip: leave bad annotations out
    on_bad_annotation: OnBadAnnotation = "raise"
    model: str = "mobile_sam"  # short name, hub repository, file or folder
    seed: int = 0  # seed of the order of images and of all random numbers
    # what trains; hq: SAM-HQ's additions to SAM; lora: the decoder and adapters of the encoder
    train: Literal["decoder", "hq", "lora", "everything"] = "decoder"
    lora_rank: int = 4  # rank of the adapters
    layer_decay: float | None = None  # layer-wise decay of a ViT's learning rate (everything)
    # keep a frozen encoder's embeddings on disk, 4 MB each (SAM-HQ: 7 to 25), if images recur
    cache: bool = True
    batch_size: int = 4  # images per step, over all devices and hosts
    max_objects: int = 8  # objects per image and step
    full_resolution: bool = False  # compare masks at the resolution of the model's input
    flip: float = 0.0  # probability of mirroring an image
    scale_range: tuple[float, float] | None = None  # large-scale jitter; the paper's is 0.1 2.0
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()  # noqa: RUF009
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()  # noqa: RUF009
    dtype: Literal["float32", "bfloat16"] = "float32"  # compute dtype; parameters are float32
    # data: each device has all parameters; fsdp: each device has a share of them
    parallelism: sharding.Parallelism = "data"
    workers: int = 0  # processes that read images; 0 for threads
    # first host's address and port, number of hosts, index of this host
    hosts: tuple[str, int, int] | None = None


# Settings that may change when a run resumes.
RESUMABLE = {"output", "hosts", "workers", "parallelism", "eval_every", "on_bad_annotation"}
RESUMABLE |= {"cache", "training", "optimizer", "remat", "accumulate", "objects_chunk_size"}
SUMMARY = "summary.json"


def main(config: Config) -> int:
    """Trains, evaluates, and writes the model.

    Returns:
        The exit code: 0, or 128 and the signal's number if Ctrl-C or SIGTERM stopped it.
    """
    if config.hosts is not None:
        jax.distributed.initialize(*config.hosts)
    check(config)
    with lock_folder(config.output) if jax.process_index() == 0 else contextlib.nullcontext():
        return run(config)


def run(config: Config) -> int:
    """`main`, in a folder that is locked for this run."""
    is_first = jax.process_index() == 0
    output = config.output
    model = from_pretrained(config.model, dtype=jnp.dtype(config.dtype))
    keep_run_settings(model, config)
    model, table = build_trainable(model, config)
    params, rest = partition(model, table)
    tx, schedule = config.optimizer.build(table, config.steps)
    transform = make_transform(model.config, config)
    dataset, held_out = open_datasets(config)
    check_objects(dataset, transform, seed=config.seed)
    if held_out is not None:
        check_objects(held_out, None)
    dataset, held_out = with_embeddings(dataset, held_out, model, config)
    mesh = sharding.make_mesh()
    merged = functools.partial(sharding.merge_on_host, mesh=mesh)
    params, rest = sharding.shard_tree((params, rest), mesh, parallelism=config.parallelism)
    begin = functools.partial(init_state, tx=tx, ema=config.training.ema_decay is not None)
    state = sharding.init_sharded(begin, params, mesh=mesh, parallelism=config.parallelism)
    del model, params  # otherwise the first device would keep them in addition to its state

    with checkpointing.open_checkpoints(output / "checkpoints") as checkpoints:
        state = checkpointing.load_state(checkpoints, state) or state
        start, key = int(state.step), jax.random.key(config.seed)
        if start > config.steps:
            raise ValueError(f"--steps is {config.steps}, but {output} is already at step {start}")
        if start:
            say(f"resuming from step {start} of {config.steps}")
        train_step = compile_step(state, tx, config=config.training)
        data = make_loader(
            dataset,
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            workers=config.workers,
        )
        log = MetricsLog(output, start + 1 if start else 0)
        if start == 0 and held_out is not None:  # the model before training
            found = evaluate_and_log(merged(state.result, rest), held_out, log, 0)
            log.write(0, found, show=True)
        progress, stopped = Progress(transform, schedule, updates_made(state.opt_state)), False
        steps = range(start + 1, config.steps + 1)
        bar = tqdm(steps, "compiling", initial=start, total=config.steps, disable=not is_first)
        batches = (sharding.put_batch(batch, mesh) for batch in data)
        batch = next(batches) if steps else {}
        running = None  # the last step, while its metrics are not fetched

        def finish(step, metrics, index) -> dict:
            """Waits for a step; returns its line of the log."""
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not np.isfinite(list(metrics.values())).all():
                images = [dataset.image_id(i) for i in sharding.fetch(index, mesh)]
                raise checkpointing.non_finite_error(
                    step, metrics, image_ids=images, checkpoints=checkpoints
                )
            if step == start + 1:  # the displayed rate excludes compilation
                bar.set_description("training")
                bar.unpause()
            bar.set_postfix(loss=metrics["loss"], iou=metrics["iou_last"])
            return progress.count(metrics)

        with Interrupts() as interrupts:
            for step in bar:
                state, metrics = train_step(state, rest, batch, key)
                # While it runs, the host finishes the step before and prepares the next one.
                if running:
                    log.write(running[0], finish(*running))
                running = step, metrics, batch["index"]
                if step < config.steps:
                    batch = next(batches)
                due, found = step % config.eval_every == 0 or step == config.steps, {}
                if due:
                    line, running = finish(*running), None
                    if held_out is not None:
                        found = evaluate_and_log(merged(state.result, rest), held_out, log, step)
                    log.write(step, line | found, show=True)
                stopped = sharding.any_host(interrupts.received is not None)
                if stopped and running:
                    log.write(step, finish(*running))
                if due or stopped:
                    checkpointing.save_state(checkpoints, state, miou=found.get("miou@1"))
                if stopped:
                    break
        bar.close()
        log.close()
    if stopped:
        say(
            f"stopped after step {step}, saved in {output / 'checkpoints' / str(step)}; rerun the "
            f"same command to resume from step {step}"
        )
        return 128 + (interrupts.received or signal.SIGINT)
    if not progress.updates:
        why = f": {too_small(transform)}" if progress.dropped else ""
        raise ValueError(
            f"none of the {config.steps} steps had an object to train on, so no model is "
            f"written{why}"
        )
    results = {"model": state}
    if held_out is not None:
        with checkpointing.open_checkpoints(output / "checkpoints") as checkpoints:
            results["best"] = checkpointing.load_state(checkpoints, state, best=True)
    for name, chosen in results.items():
        if chosen and not is_written(output, name, config.steps):
            write_model(merged(chosen.result, rest), name, config)
    if is_first:
        summary = summarize_metrics(read_metrics(output / "metrics.jsonl"))
        text = json.dumps({"steps": config.steps, **summary}, indent=2, allow_nan=False)
        (output / SUMMARY).write_text(text + "\n")
        print(*describe(summary, transform), output / "model", sep="\n")
    return 0


class Progress:
    """What the steps have trained on so far."""

    def __init__(self, transform: ExampleTransform, schedule: Callable, updates: int):
        self._transform, self._schedule, self.updates = transform, schedule, updates
        self.used, self.dropped, self._warned = 0, 0, False

    def count(self, metrics: dict[str, float]) -> dict[str, float | None]:
        """Counts a step's objects; returns its metrics with the learning rate."""
        counts = {k: int(v) for k, v in metrics.items() if k.startswith("objects_")}
        metrics = metrics | counts | {"learning_rate": float(self._schedule(self.updates))}
        self.updates += counts["objects_used"] > 0
        self.used += counts["objects_used"]
        self.dropped += counts["objects_dropped"]
        if not self._warned and self.dropped >= max(5, (self.used + self.dropped) / 10):
            self._warned = True
            say(
                f"warning: {self.dropped} of {self.used + self.dropped} objects have been left out "
                f"so far: {too_small(self._transform)}"
            )
        if not counts["objects_used"]:  # no training, so no loss
            return dict.fromkeys(metrics) | counts
        return metrics


def say(text: str) -> None:
    """Prints a line to stderr, on the first host only."""
    if jax.process_index() == 0:
        tqdm.write(f"finetune: {text}", file=sys.stderr)


def is_written(output: Path, name: str, steps: int) -> bool:
    """Whether a result with this number of steps exists; a run may have been extended."""
    try:
        summary = json.loads((output / SUMMARY).read_text())
        return (output / name).exists() and summary["steps"] == steps
    except (OSError, ValueError, TypeError, KeyError):  # killed before it was written, or damaged
        return False


def write_model(tuned, name: str, config: Config) -> None:
    """Writes a result, with its adapters for --train lora; one of fewer steps is replaced."""
    is_first, output = jax.process_index() == 0, config.output
    if is_first:
        shutil.rmtree(output / name, ignore_errors=True)
    multihost_utils.sync_global_devices(f"may write {name}")
    if is_first and config.train == "lora":
        adapters = output / f"{name}.adapters.safetensors"
        adapters.unlink(missing_ok=True)
        save_lora(tuned, adapters)
    save_pretrained(merge_lora(tuned), output / name)


def describe(summary: dict, transform: ExampleTransform) -> list[str]:
    """The summary as lines of text."""
    used, dropped = summary["objects_used"], summary["objects_dropped"]
    lines = [f"objects: {used} used, {dropped} dropped"]
    if dropped:
        lines[0] += f", because {too_small(transform)}"
    labels = {"loss": "loss", "iou_last": "IoU", "miou@box": "mean IoU by box"}
    for name, before in summary["before"].items():
        label = labels.get(name, f"mean IoU by clicks, {name.removeprefix('miou@')}")
        lines.append(f"{label}: {before:.3f} -> {summary['after'][name]:.3f}")
    return lines


def check(config: Config):
    """Checks the options before images are encoded, which takes long.

    Raises:
        ValueError: if options are invalid or would have no effect.
    """
    if min(config.steps, config.eval_every, config.batch_size) < 1:
        raise ValueError("--steps, --eval-every and --batch-size must be at least 1")
    if min(config.seed, config.workers) < 0:
        raise ValueError("--seed and --workers must be at least 0")
    parts = {"devices": jax.device_count(), "parts of --accumulate": config.training.accumulate}
    for name, count in parts.items():
        if config.batch_size % count:
            raise ValueError(
                f"--batch-size is {config.batch_size}, expected a multiple of the {count} {name}"
            )
    if config.layer_decay is not None and config.train != "everything":
        raise ValueError("--layer-decay is for --train everything")
    options = {"--drop-path-rate": config.training.drop_path_rate, "--remat": config.training.remat}
    for name, given in options.items():
        if given and keeps_encoder(config):
            raise ValueError(
                f"{name} requires a trained image encoder: --train lora or --train everything"
            )


def keeps_encoder(config: Config) -> bool:
    """Whether the image encoder is frozen."""
    return config.train in ("decoder", "hq")


def keep_run_settings(model, config: Config):
    """Compares the options with those of the run so far, or writes them for a new run."""
    settings = vars(config) | vars(config.training) | vars(config.optimizer)
    if Path(config.model).exists():
        settings["model"] = Path(config.model)
    free = RESUMABLE | {"steps"} if config.optimizer.schedule == "constant" else RESUMABLE
    settings = {name: normalize(value) for name, value in settings.items() if name not in free}
    settings["weights"] = params_sha256(flat_params(model))
    settings["data"] = fingerprint(config.annotations)
    config.output.mkdir(parents=True, exist_ok=True)
    has_checkpoint = any(path.name.isdigit() for path in config.output.glob("checkpoints/*"))
    result = config.output / "model"
    if not has_checkpoint and result.exists():
        raise ValueError(f"{result} exists already without its run; choose another --output")
    try:
        check_or_write_settings(
            config.output / "settings.json", settings, has_results=has_checkpoint
        )
    except ValueError as error:
        raise ValueError(
            f"{error}. Choose another --output. To train this run's result further, wait until it "
            f"is finished and add --model {result}. (Only runs with --schedule constant from the "
            "beginning can be extended to more --steps.)"
        ) from error


def normalize(value) -> str:
    """A setting in comparable form; paths are absolute."""
    return str(value.resolve() if isinstance(value, Path) else value)


def build_trainable(model, config: Config):
    """The model, with adapters for --train lora, and the table of what trains."""
    if config.train == "lora":
        layers = r"image_encoder\..*\.(qkv|proj)"
        model = add_lora(model, layers, rank=config.lora_rank, rngs=nnx.Rngs(config.seed))
    elif config.layer_decay is not None:
        return model, layer_decay(model.config, config.layer_decay)
    return model, TABLES[config.train]


def make_transform(model_config: SamConfig, config: Config) -> ExampleTransform:
    """The transform that brings images and masks into the shapes of a step."""
    size = model_config.image_size if config.full_resolution else model_config.mask_size
    return ExampleTransform(
        model_config,
        config.max_objects,
        target_size=size,
        flip=config.flip,
        scale_range=config.scale_range,
    )


def open_datasets(config: Config):
    """The training dataset, and the held-out dataset or None."""
    opened = functools.partial(open_annotations, on_bad_annotation=config.on_bad_annotation)
    dataset = opened(config.annotations, config.images)
    if config.eval_annotations is None:
        return dataset, None
    return dataset, opened(config.eval_annotations, config.eval_images)


def with_embeddings(dataset, held_out, model, config: Config):
    """The datasets, with embeddings on disk if that saves time."""
    if not (config.cache and keeps_encoder(config)):
        return dataset, held_out
    # The encoder is frozen, so an image that is used again unchanged needs encoding only once.
    augments = config.flip > 0 or config.scale_range is not None
    comes_again = not augments and config.steps * config.batch_size > len(dataset)
    chosen = [dataset if comes_again else None, held_out]
    total = sum(len(dataset) for dataset in chosen if dataset)
    folder = config.output / "embeddings"
    with tqdm(desc="encoding", total=total, disable=jax.process_index() > 0) as bar:
        cached = [
            s and CachedEmbeddings(s, model, folder=folder, on_image=bar.update) for s in chosen
        ]
    return cached[0] or dataset, cached[1]


def evaluate_and_log(model, held_out, log: MetricsLog, step: int) -> dict[str, float]:
    """Evaluates the model, and logs an image of its masks."""
    log.log_image(step, draw_clicks(model, held_out))
    hidden = jax.process_index() > 0
    with tqdm(desc="evaluating", total=len(held_out), leave=False, disable=hidden) as bar:
        return evaluate(model, held_out, on_image=bar.update)


def terminate(number, _):
    """Makes SIGTERM outside the loop act like Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    warnings.formatwarning = lambda message, *_: f"finetune: warning: {message}\n"
    # Orbax's threads would print tracebacks of errors that are reported below.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__.splitlines()[0])))
    except KeyboardInterrupt as error:
        print("finetune: stopped; rerun the same command to resume", file=sys.stderr, flush=True)
        os._exit(128 + (error.args[0] if error.args else signal.SIGINT))
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"finetune: {error}", file=sys.stderr, flush=True)
        # Exit immediately: a regular exit would wait for the other hosts, which wait for this one.
        os._exit(1)
