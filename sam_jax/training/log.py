"""What a run tells: a line of JSON for each step, pictures, and TensorBoard's files."""

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

with needs_extra("train"):
    from tensorboardX import SummaryWriter


class MetricsLog:
    """`metrics.jsonl`, a line per step, and beside it `pictures/` and `tensorboard/`.

    A run that goes on drops the lines of the steps that it does again, and what is not a line of a
    step. Of several hosts only the first writes.

    Args:
        folder: of the run.
        first: the step whose line is to come first: 0, before training, for a new run.
    """

    def __init__(self, folder: str | os.PathLike, first: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        path = Path(folder) / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] < first]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._pictures = path.with_name("pictures")
        self._board = SummaryWriter(str(path.with_name("tensorboard")), purge_step=first)

    def write(self, step: int, values: Mapping[str, float | None], *, show: bool = False) -> None:
        """One step's values, also printed if asked; they are on disk when this returns.

        JSON has neither NaN nor infinity: they are null, as is what a step does not have (None).
        """
        if not self._writes:
            return
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, **finite}, allow_nan=False)
        self._file.write(line + "\n")
        if show:
            tqdm.write(line)
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def log_image(self, step: int, picture: Image.Image) -> None:
        """A picture of the step, `pictures/000123.png`."""
        if not self._writes:
            return
        with atomic_write(self._pictures / f"{step:06}.png") as temporary:
            picture.save(temporary)
        self._board.add_image("predictions", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        if self._writes:
            self._file.close()
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; none if there is no file.

    What is not a line of a step is left out: a run that was killed, or a machine that lost power,
    may have left half a line or bytes of another file.
    """
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = read_json(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found
