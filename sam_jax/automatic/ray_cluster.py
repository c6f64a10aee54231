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
from sam_jax.types import Runtime

_TRIES = 3  # per image, if its workers die


def generate_with_ray(
    address: str | None,
    model: str,
    dtype: str,
    options: MaskGenerationOptions,
    files: Sequence[Path],
    results: Results,
    on_image: Callable[[], object],
    on_failure: Callable[[Path, str], object],
    *,
    runtime: Runtime = "jax",
) -> None:
    """Runs `generate_folder` on the machines of a Ray cluster, which must all see the same folders.

    Ray Data schedules the images on actors, one per GPU, or one per machine if there are no GPUs.
    Each actor loads the model and compiles once. If an actor dies, another one retries its image;
    finished images are skipped. An image at which three actors died has failed.

    Args:
        address: the cluster's; None for one that runs on this machine or else a new one.
        model: what `from_pretrained` takes, on every machine.
        dtype: the compute dtype, as for `from_pretrained`.
        options: the generators' options.
        files: the image files.
        results: where to write.
        on_image: as for `generate_folder`.
        on_failure: as for `generate_folder`.
        runtime: as for the generators.

    Raises:
        ValueError: if an argument is invalid or the run fails.
        MissingExtra: without the extra `ray`.
        ConnectionError: if nothing answers at the address.
    """
    with needs_extra("ray"):
        import ray.data
        import ray.exceptions
    _check_reachable(address)
    is_new = not ray.is_initialized()
    ray.init(address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True)
    try:
        with temporary_folder(results.folder) as tries:
            results = dataclasses.replace(results, folder=results.folder.absolute())
            worker = model, dtype, runtime, options, results, tries.absolute()
            for row in _rows_of_ray(ray, worker, files):
                if row["problem"]:
                    on_failure(Path(row["image"]), row["problem"])
                on_image()
    except ray.exceptions.RayError as error:
        raise ValueError(f"the run on Ray failed: {one_line(error)}") from error
    finally:
        if is_new:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Fails fast: without this, Ray waits minutes for a cluster that does not answer."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host:  # None, "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error


def _rows_of_ray(ray, worker: tuple, files: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Yields what `_Worker` returns for each image.

    Raises:
        ValueError: if a worker fails in a way that every image would.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    rows = ray.data.from_items(
        [{"image": str(file), "absolute": str(file.absolute())} for file in files],
        override_num_blocks=min(len(files), 1000),
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
            raise ValueError(f"the run on Ray failed at {row['image']}: {row['problem']}")
        yield row


class _Worker:
    """A Ray actor that generates the masks of one image after the other.

    Ray would restart an actor that dies at an image forever, and hides the causes of exceptions.
    So attempts are counted in files, and exceptions are returned as results.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        runtime: Runtime,
        options: MaskGenerationOptions,
        results: Results,
        tries: Path,
    ):
        self.model, self.dtype, self.options = model, dtype, options
        self.runtime: Runtime = runtime
        self.results, self.tries = results, tries

    @functools.cached_property
    def generator(self) -> SamAutomaticMaskGenerator:
        """Created at the first image, so that it counts as an attempt if this kills the worker."""
        sam = from_pretrained(self.model, dtype=self.dtype)
        return SamAutomaticMaskGenerator(sam, **vars(self.options), runtime=self.runtime)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Adds `outcome` and `problem` to the row.

        The outcome is "worked"; "lost" if the image's workers died; "unmade" if they died before
        they had a generator; or "error", which ends the run.
        """
        file, problems = Path(row["absolute"]), []
        tries = self.tries / file.name
        try:
            if not self.results.is_finished(file):
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
                    [file],
                    self.results,
                    on_image=lambda: None,
                    on_failure=lambda _, problem: problems.append(problem),
                )
                tries.unlink()
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            return {**row, "outcome": "error", "problem": problem}
        return {**row, "outcome": "worked", "problem": "".join(problems)}
