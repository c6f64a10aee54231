"""Batches of examples, each of which depends on the seed and the step alone."""

import signal
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np

from sam_jax.errors import needs_extra
from sam_jax.training.datasets import Dataset, Example
from sam_jax.training.transform import ExampleTransform, too_small

_LOOKED_AT = 1000  # images in which `check_objects` looks for an object
_EPOCHS = 2**31  # without end, but for what grain's arithmetic can count


def make_loader(
    source: Dataset,
    prepare: ExampleTransform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterable[dict[str, np.ndarray]]:
    """Batches without end, shuffled anew in each epoch.

    The batch of a step depends on the seed and the step alone, not on where a run was interrupted,
    nor on the number of workers or hosts; each host gets its part of it.

    Args:
        source: examples.
        prepare: gives them a shape.
        batch_size: of all hosts together.
        seed: of the order, and of all that is by chance.
        start: the first step, where a run goes on.
        workers: processes that read; 0 for threads of this one.
        process_index: of this host; JAX's if left out.
        process_count: of hosts; JAX's if left out.

    Raises:
        ValueError: if the batch cannot be shared by the hosts, or the source is empty; from the
            iterator, if an example cannot be read or prepared, with the image's id.
        MissingExtra: without the extra `train`.
    """
    with needs_extra("train"):
        import grain

    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of the {process_count} hosts"
        )
    if not len(source):
        raise ValueError("there are no pictures to train on")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or above")
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .random_map(_Reader(source, prepare))
        .repeat(_EPOCHS)
        .batch(batch_size // process_count)
        .slice(slice(process_index, None, process_count))
        .slice(slice(start, None))
    )
    ahead = max(2, workers)
    threads = grain.ReadOptions(num_threads=min(4, ahead), prefetch_buffer_size=ahead)
    dataset = dataset.to_iter_dataset(threads)
    if workers:
        import absl.flags

        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # grain's workers look at flags, parsed or not
        options = grain.MultiprocessingOptions(num_workers=workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_signals_to_the_parent)
    return dataset


def check_objects(source: Dataset, prepare: ExampleTransform | None, *, seed: int = 0) -> None:
    """Makes sure that there is an object to train or to evaluate on, by reading until the first.

    At most 1,000 images are read, in random order, so that it takes a minute or two at the worst.
    If there is none in so many of a larger source, that is a warning.

    Args:
        source: examples.
        prepare: as for `make_loader`; None for evaluation, which takes objects of any size.
        seed: of the order, and of what is random in `prepare`.

    Raises:
        ValueError: if there is none in the whole source, or an example cannot be read; if all
            objects are too small for the target grid, the message says what to do.
    """
    rng, dropped = np.random.default_rng(seed), False
    read = min(len(source), _LOOKED_AT)
    # Where crops are random, an object that one misses another may show.
    tries = read if prepare is None or not prepare.augments else max(read, _LOOKED_AT // 10)
    reader, order = _Reader(source, prepare or _any_object), rng.permutation(len(source))[:read]
    for i in range(tries):
        example = reader(int(order[i % read]), rng)
        if example["valid"].any():
            return
        dropped |= example["dropped"] > 0
    message = f"none of the {read} images that were read has an object"
    if prepare is not None and dropped:
        message = (
            f"no object of the {read} images that were read can be trained on: {too_small(prepare)}"
        )
    if read == len(source):
        raise ValueError(message)
    warnings.warn(f"{message} (the other {len(source) - read} were not read)", stacklevel=2)


@dataclass(frozen=True)
class _Reader:
    """Reads an example by its number and prepares it; errors name the image."""

    source: Dataset
    prepare: Callable[[Example, np.random.Generator], Example]

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        try:
            return self.prepare({**self.source[index], "index": index}, rng)
        except Exception as error:  # whatever a source of one's own raises
            image_id = getattr(self.source, "image_id", int)(index)
            if f"image {image_id}:" in str(error):
                raise
            raise ValueError(f"image {image_id}: {str(error) or repr(error)}") from error


def _any_object(example: Example, _: np.random.Generator) -> Example:
    found = any(mask.any() for mask in example["masks"])
    return {"valid": np.array([found]), "dropped": 0}


def _leave_signals_to_the_parent(*_: int) -> None:
    """Terminals and schedulers signal all processes, but only the parent can end a run in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
