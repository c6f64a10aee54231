"""What a run tells: a line of JSON for each step, pictures, and TensorBoard's files."""

import json
import os
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sam_jax.files import replacing


class MetricsLog:
    """`metrics.jsonl`, a line per step, and beside it `pictures/` and `tensorboard/`.

    A run that goes on drops the lines of the steps that it does again. Of several hosts only the
    first writes.

    Args:
        folder: of the run.
        first: the step whose line is to come first: 0, before training, for a new run.
    """

    def __init__(self, folder: str | os.PathLike, first: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        path = Path(folder) / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] < first]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._pictures = path.with_name("pictures")
        self._board = SummaryWriter(str(path.with_name("tensorboard")), purge_step=first)

    def write(self, step: int, values: dict[str, float], *, show: bool = False) -> None:
        """One step's values, also printed if asked; they are on disk when this returns."""
        if not self._writes:
            return
        line = json.dumps({"step": step, **values})
        self._file.write(line + "\n")
        if show:
            tqdm.write(line)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """A picture of the step, `pictures/000123.png`."""
        if not self._writes:
            return
        self._pictures.mkdir(exist_ok=True)
        picture.save(self._pictures / f"{step:06}.png")
        self._board.add_image("predictions", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        if self._writes:
            self._file.close()
            self._board.close()


def _lines(path: Path) -> list[str]:
    """Its whole lines; a run that was killed may have left half of one."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return lines
