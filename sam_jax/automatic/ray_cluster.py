"""Automatic mask generation for many images on the machines of a Ray cluster."""

import dataclasses
import functools
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sam_jax.automatic.folder import generate_folder
from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.results import Results, one_line
from sam_jax.checkpoints import from_pretrained
from sam_jax.errors import needs_extra
from sam_jax.files import temporary_folder

_TRIES = 3  # of an image whose worker dies


def generate_with_ray(
    address: str | None,
    model: str,
    dtype: str,
    options: MaskGenerationOptions,
    pictures: Sequence[Path],
    results: Results,
    on_image: Callable[[], object],
    on_failure: Callable[[Path, str], object],
) -> None:
    """`generate_folder` on the machines of a Ray cluster, which must all see the same folders.

    Ray Data schedules the pictures on actors (as many as GPUs, or as machines if there are none),
    which load the model once and compile once. What a lost one was at is tried again by
    another, which passes over what is finished; an image at which three were lost has failed.

    Args:
        address: of the cluster; None for one that runs on this machine or a new one.
        model: what `from_pretrained` takes, on every machine.
        dtype: likewise.
        options: of the generators.
        pictures: files.
        results: where to write.
        on_image: as for `generate_folder`.
        on_failure: likewise.

    Raises:
        ValueError: for invalid arguments, and if the run fails.
        MissingExtra: without the extra `ray`.
        ConnectionError: if nothing answers at the address.
    """
    with needs_extra("ray"):
        import ray.data
        import ray.exceptions
    _check_reachable(address)
    ours = not ray.is_initialized()
    ray.init(address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True)
    try:
        with temporary_folder(results.folder) as tries:
            results = dataclasses.replace(results, folder=results.folder.absolute())
            worker = model, dtype, options, results, tries.absolute()
            for row in _rows_of_ray(ray, worker, pictures):
                if row["problem"]:
                    on_failure(Path(row["picture"]), row["problem"])
                on_image()
    except ray.exceptions.RayError as error:
        raise ValueError(f"the run on Ray failed: {one_line(error)}") from error
    finally:
        if ours:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray waits for minutes for a cluster that is not there."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host:  # None, "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error


def _rows_of_ray(ray, worker: tuple, pictures: Sequence[Path]) -> Iterator[dict[str, str]]:
    """What `_Worker` returns, for each picture.

    Raises:
        ValueError: for what would happen to each of them.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    rows = ray.data.from_items(
        [{"picture": str(picture), "absolute": str(picture.absolute())} for picture in pictures],
        override_num_blocks=min(len(pictures), 1000),
    ).map(
        _Worker,
        fn_constructor_args=worker,
        concurrency=(1, gpus or machines),
        num_gpus=1 if gpus else None,
        scheduling_strategy="SPREAD",
    )
    outcomes = set()
    for row in rows.iter_rows():
        outcomes.add(row["outcome"])
        if "error" in outcomes or outcomes == {"unmade"}:
            raise ValueError(f"the run on Ray failed at {row['picture']}: {row['problem']}")
        yield row


class _Worker:
    """A Ray actor: a generator that does one picture after the other.

    Ray would start one that dies again without end, at the same picture, and hide the cause of
    an exception. So tries are counted, in files, and an exception is a result.
    """

    def __init__(
        self, model: str, dtype: str, options: MaskGenerationOptions, results: Results, tries: Path
    ):
        self.model, self.dtype, self.options = model, dtype, options
        self.results, self.tries = results, tries

    @functools.cached_property
    def generator(self) -> SamAutomaticMaskGenerator:
        """Made at the first picture: where making it kills the worker, that counts as a try."""
        sam = from_pretrained(self.model, dtype=self.dtype)
        return SamAutomaticMaskGenerator(sam, **vars(self.options))

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Adds to the row `outcome` and `problem`.

        The outcome is "worked"; "lost", if the image's workers died, or "unmade", if they did so
        before they had a generator; or an "error" that ends the run.
        """
        picture, problems = Path(row["absolute"]), []
        tries = self.tries / picture.name
        try:
            if not self.results.is_finished(picture):
                made = tries.read_bytes() if tries.exists() else b""  # a byte for each try
                if len(made) >= _TRIES:
                    problem = (
                        f"its worker died at each of {_TRIES} tries (killed, or out of memory); "
                        "try it without --ray"
                    )
                    outcome = "lost" if b"+" in made else "unmade"
                    return {**row, "outcome": outcome, "problem": problem}
                tries.write_bytes(made + b"-")
                generator = self.generator
                tries.write_bytes(made + b"+")
                generate_folder(
                    generator,
                    [picture],
                    self.results,
                    on_image=lambda: None,
                    on_failure=lambda _, problem: problems.append(problem),
                )
                tries.unlink()
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            return {**row, "outcome": "error", "problem": problem}
        return {**row, "outcome": "worked", "problem": "".join(problems)}
