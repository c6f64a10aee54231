"""Batches of examples that depend only on the seed and the step."""

import signal
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np

from sam_jax.errors import check_whole, needs_extra
from sam_jax.training.datasets import Dataset, Example
from sam_jax.training.transform import ExampleTransform, too_small

_MAX_CHECKED = 1000  # images in which `check_objects` looks for an object
_EPOCHS = 2**31  # endless, within the limits of grain's arithmetic


def make_loader(
    dataset: Dataset,
    transform: ExampleTransform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterable[dict[str, np.ndarray]]:
    """Endless batches, shuffled again in each epoch.

    The batch of a step depends only on the seed and the step, not on interruptions of the run or
    the number of workers or hosts. Each host gets its part of the batch.

    Args:
        dataset: the examples; see `sam_jax.training.datasets`.
        transform: brings examples into a fixed shape.
        batch_size: number of examples over all hosts.
        seed: seed of the order and of all random numbers.
        start: the first step, to resume a run.
        workers: number of processes that read examples; 0 for threads of this process.
        process_index: index of this host; JAX's if left out.
        process_count: number of hosts; JAX's if left out.

    Raises:
        ValueError: for a number out of its range, if the batch cannot be split among the hosts, or
            if the dataset is empty; from the iterator, if an example cannot be read or transformed,
            with the image's id.
        MissingExtra: without the extra `train`.
    """
    with needs_extra("train"):
        import grain

    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0)
    check_whole("start", start, 0)
    check_whole("workers", workers, 0)
    check_whole("process_count", process_count, 1)
    check_whole("process_index", process_index, 0, process_count - 1)
    if batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of the {process_count} hosts"
        )
    if not len(dataset):
        raise ValueError("there are no images to train on")
    examples = (
        grain.MapDataset.range(len(dataset))
        .seed(seed)
        .shuffle()
        .random_map(_Reader(dataset, transform))
        .repeat(_EPOCHS)
        .batch(batch_size // process_count)
        .slice(slice(process_index, None, process_count))
        .slice(slice(start, None))
    )
    ahead = max(2, workers)
    threads = grain.ReadOptions(num_threads=min(4, ahead), prefetch_buffer_size=ahead)
    examples = examples.to_iter_dataset(threads)
    if workers:
        import absl.flags

        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # grain's workers read flags, parsed or not
        options = grain.MultiprocessingOptions(num_workers=workers)
        examples = examples.mp_prefetch(options, worker_init_fn=_leave_signals_to_the_parent)
    return examples


def check_objects(dataset: Dataset, transform: ExampleTransform | None, *, seed: int = 0) -> None:
    """Checks that there is an object to train or evaluate on, by reading until the first one.

    At most 1,000 images are read, in random order, which takes at most a minute or two. If a larger
    dataset has no object in them, that is a warning.

    Args:
        dataset: the examples; see `sam_jax.training.datasets`.
        transform: as for `make_loader`; None for evaluation, which accepts objects of any size.
        seed: seed of the order and of random numbers in `transform`.

    Raises:
        ValueError: if the whole dataset does not have an object, or an example cannot be read; if
            all objects are too small for the target grid, the message says what to do.
    """
    rng, dropped = np.random.default_rng(seed), False
    read = min(len(dataset), _MAX_CHECKED)
    # With random crops, an object outside one crop may be inside another.
    tries = read if transform is None or not transform.augments else max(read, _MAX_CHECKED // 10)
    reader, order = _Reader(dataset, transform or _any_object), rng.permutation(len(dataset))[:read]
    for i in range(tries):
        example = reader(int(order[i % read]), rng)
        if example["valid"].any():
            return
        dropped |= example["dropped"] > 0
    message = f"none of the {read} images that were read has an object"
    if transform is not None and dropped:
        message = f"no object in the {read} images that were read is usable: {too_small(transform)}"
    if read == len(dataset):
        raise ValueError(message)
    warnings.warn(f"{message} (the other {len(dataset) - read} were not read)", stacklevel=2)


@dataclass(frozen=True)
class _Reader:
    """Reads and transforms an example by its index; errors name the image."""

    dataset: Dataset
    transform: Callable[[Example, np.random.Generator], Example]

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        try:
            found = self.transform({**self.dataset[index], "index": index}, rng)
            if found is None:  # which grain would skip, and read on forever
                raise ValueError("its transform returned None, expected an example")
            return found
        except Exception as error:  # custom datasets may raise anything
            image_id = getattr(self.dataset, "image_id", int)(index)
            if f"image {image_id}:" in str(error):
                raise
            # The text of a KeyError is a key alone.
            what = repr(error) if isinstance(error, KeyError) or not str(error) else str(error)
            raise ValueError(f"image {image_id}: {what}") from error


def _any_object(example: Example, _: np.random.Generator) -> Example:
    found = any(mask.any() for mask in example["masks"])
    return {"valid": np.array([found]), "dropped": 0}


def _leave_signals_to_the_parent(*_: int) -> None:
    """Ignores signals: terminals and schedulers signal all processes, but the parent ends a run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
