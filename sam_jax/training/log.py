"""The log of a run: a line of JSON for each step, images, and TensorBoard files."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from sam_jax.errors import needs_extra
from sam_jax.files import atomic_write, read_json


class MetricsLog:
    """Writes `metrics.jsonl`, with a line per step, and `images/` and `tensorboard/` next to it.

    A resumed run removes the lines of steps that it repeats, and lines that do not belong to a
    step. With several hosts, only the first one writes.

    Args:
        folder: the run's folder.
        first: the next step to be logged; 0, before training, for a new run.

    Raises:
        MissingExtra: without the extra `train`.
    """

    def __init__(self, folder: str | os.PathLike, first: int):
        with needs_extra("train"):
            from tensorboardX import SummaryWriter

        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        path = Path(folder) / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] < first]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._images = path.with_name("images")
        self._board = SummaryWriter(str(path.with_name("tensorboard")), purge_step=first)

    def write(
        self, step: int, values: Mapping[str, float | jax.Array | None], *, show: bool = False
    ) -> None:
        """Writes one step's values to disk, and prints them if `show`.

        Missing values (None), NaN and infinity are null, since JSON does not have them.
        """
        if not self._writes:
            return
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        # JAX's scalars, such as a step's metrics, are not JSON.
        line = json.dumps({"step": step, **finite}, allow_nan=False, default=float)
        self._file.write(line + "\n")
        if show:
            tqdm.write(line)
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def log_image(self, step: int, image: Image.Image) -> None:
        """Writes an image of the step to `images/000123.png`."""
        if not self._writes:
            return
        with atomic_write(self._images / f"{step:06}.png") as temporary:
            image.save(temporary)
        self._board.add_image("predictions", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        if self._writes:
            self._file.close()
            self._board.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; an empty list if there is no file.

    Lines that do not belong to a step are left out: after a crash or a power failure there may be a
    partial line or bytes of another file.
    """
    path, found = Path(path), []
    if not path.exists():
        return []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = read_json(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def summarize_metrics(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's numbers of objects, and its metrics `before` and `after`.

    With held-out images, these are the first and the last evaluation; otherwise, the means over the
    first and the last tenth of the steps.

    Args:
        lines: from `read_metrics`, of a run that has trained.
    """
    evaluated = [line for line in lines if "miou@1" in line]
    learned = [line for line in lines if line.get("loss") is not None]
    if evaluated:
        ends = evaluated[0], evaluated[-1]
        names = [name for name in evaluated[0] if name.startswith("miou@")]
    else:
        tenth = -(-len(learned) // 10)
        names = ["loss", "iou_last"]
        parts = learned[:tenth], learned[-tenth:]
        ends = [{n: float(np.mean([line[n] for line in part])) for n in names} for part in parts]
    totals = {n: sum(x.get(n) or 0 for x in lines) for n in ("objects_used", "objects_dropped")}
    before, after = ({name: end[name] for name in names} for end in ends)
    return {**totals, "before": before, "after": after}
