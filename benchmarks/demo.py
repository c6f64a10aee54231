"""How long visitors of the demo page wait, in headless Chromium.

    python -m benchmarks.demo

Serves MobileSAM with `sam-jax demo`, opens a photo and clicks on it at several places, then again
while another visitor runs everything mode. Opening is timed from choosing the file until the image
is shown, a click from pressing the button until the mask is ready to be painted. Needs chromium and
chromedriver.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from benchmarks.common import Table, machine_line

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from browser import Page, open_browser, running_demo
from visitor import Visitor

PHOTOS = {"0.26": skimage.data.astronaut, "12": skimage.data.coffee}  # by megapixels
CLICKS = 24
_WATCH = """
window.taken = [];
let start;
window.addEventListener("pointerdown", () => { start = performance.now(); }, true);
document.addEventListener("load", (event) => {
  if (!event.target.matches(".stage .mask")) return;
  requestAnimationFrame(() => window.taken.push(performance.now() - start));
}, true);
"""
COLUMNS = ("Photo", "Opened", "Click, median", "Fastest", "Slowest")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.perf_counter()
        with running_demo(folder) as address, open_browser(folder) as browser:
            started = f"; the model was compiled after {time.perf_counter() - begin:.0f} s"
            table = Table("Waiting on the demo page", COLUMNS, machine_line() + started)
            for megapixels, load in PHOTOS.items():
                path = folder / f"{megapixels}.jpg"
                Image.fromarray(load()).resize(size(load(), float(megapixels))).save(path)
                for others in (contextlib.nullcontext(), everything(address, path)):
                    with others as note:
                        opened, clicks = visit(Page(browser, address, folder), path)
                    cells = statistics.median(clicks), min(clicks), max(clicks)
                    cells = [f"{seconds:.2f} s" for seconds in (opened, *cells)]
                    table.add([f"{megapixels} megapixels{note or ''}", *cells])


@contextlib.contextmanager
def everything(address: str, path: Path) -> Iterator[str]:
    """Another visitor runs everything mode again and again."""
    other, ended = Visitor(address), threading.Event()
    other.open(path.read_bytes())

    def run() -> None:
        while not ended.is_set():
            other.post("everything", {"points_per_side": 32})

    thread = threading.Thread(target=run)
    thread.start()
    yield ", during everything mode"
    ended.set()
    while thread.is_alive():
        other.post("undo")  # ends everything mode
        thread.join(0.5)


def size(image: np.ndarray, megapixels: float) -> tuple[int, int]:
    """Width and height of an image with the same aspect ratio and this number of pixels."""
    height, width, _ = image.shape
    scale = (megapixels * 1e6 / (height * width)) ** 0.5
    return round(width * scale), round(height * scale)


def visit(page: Page, path: Path) -> tuple[float, list[float]]:
    """Seconds to open the photo, and for each click."""
    begin = time.perf_counter()
    page.choose(path)
    page.wait(lambda: page.run("return document.querySelector('.stage .image').complete"))
    opened = time.perf_counter() - begin
    page.run(_WATCH)
    taken: list[float] = []
    for x, y in np.random.default_rng(0).uniform(0.1, 0.9, (CLICKS, 2)):
        before = len(taken)
        page.mouse((x, y))
        while len(taken) == before:
            time.sleep(0.02)
            taken = page.run("return window.taken")
    return opened, [milliseconds / 1e3 for milliseconds in taken]


if __name__ == "__main__":
    main()
