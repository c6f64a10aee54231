"""Times a click with `sam-jax segment`, from Enter to the prompt, and the parts of this time.

    python -m benchmarks.cold_start

Each run is a separate process that reads MobileSAM's checkpoint and a photo of 512 x 512 pixels,
and writes the masks of one point: `sam-jax segment` with an empty cache of compiled programs, with
a full one and without one, the same with `--runtime openvino`, and a script of a few lines with
MobileSAM's own code in PyTorch. They take turns. The second table has the parts of
`sam-jax segment`, each timed until its result is there (the command itself compiles or loads the
decoder's program while the encoder runs).
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import skimage.data
from PIL import Image

from benchmarks.common import Table, check_at_least_one, machine_line
from sam_jax.checkpoints.download import resolve

COLUMNS = ("A click at the shell", "Median", "Fastest", "CPU time")
POINT = 220, 100
THEIRS = """
import sys
import numpy as np
from PIL import Image
from torch_reference import import_reference

checkpoint, photo, output, x, y = sys.argv[1:]
package = import_reference("mobile_sam")
predictor = package.SamPredictor(package.sam_model_registry["vit_t"](checkpoint=checkpoint).eval())
predictor.set_image(np.asarray(Image.open(photo)))
masks, scores, _ = predictor.predict(np.array([[float(x), float(y)]]), np.array([1]))
for i, mask in enumerate(masks):
    Image.fromarray(mask).save(f"{output}/mask_{i}.png")
"""
PARTS = """
import json, sys, time
found, last = {}, time.perf_counter()

def part(name):
    global last
    found[name], last = time.perf_counter() - last, time.perf_counter()

import jax, flax.nnx
part("import JAX and Flax")
import numpy as np
from sam_jax import SamPredictor, enable_compilation_cache, from_pretrained, load_image
import sam_jax.cli
from sam_jax.visualize import overlay
part("import sam_jax")
enable_compilation_cache()
predictor = SamPredictor(from_pretrained(sys.argv[1]))
part("build the model, load its weights")
image = load_image(sys.argv[2])
part("read the photo")
predictor.set_image(image)
part("make the encoder's program: trace it, compile it or load it")
predictor.get_image_embedding()
part("run the encoder")
point = np.array([[list(map(float, sys.argv[4:]))]])
masks, scores, _ = predictor.predict_batch(point, np.array([[1]]))
part("make the decoder's program, run it, resize the masks")
overlay(image, masks[0, :1]).save(sys.argv[3] + "/overlay.png")
part("draw and write the overlay")
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="turns of each contender")
    arguments = parser.parse_args()
    check_at_least_one(parser, repeat=arguments.repeat)
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), arguments.repeat)


def measure(folder: Path, repeat: int) -> None:
    """Runs all contenders in turns and writes both tables."""
    photo, checkpoint = folder / "photo.png", resolve("mobile_sam")
    Image.fromarray(skimage.data.astronaut()).save(photo)
    point = ",".join(map(str, POINT))
    ours = ["sam-jax", "segment", photo, "--point", point, "--model", checkpoint]
    ours += ["--output", folder / "ours"]
    theirs = [sys.executable, "-c", THEIRS, checkpoint, photo, folder, *POINT]
    parts = [sys.executable, "-c", PARTS, checkpoint, photo, folder, *POINT]
    in_openvino = [*ours, "--runtime", "openvino"]
    empty, full = folder / "empty", folder / "full"
    for command in (ours, in_openvino, theirs):
        run(command, full)  # compiles, and has the files of all packages in memory
    contenders = {
        "`sam-jax segment`, nothing compiled yet": (ours, empty, {}),
        "`sam-jax segment`, compiled by an earlier run": (ours, full, {}),
        "`sam-jax segment`, without a cache": (ours, full, {"JAX_ENABLE_COMPILATION_CACHE": "0"}),
        "`sam-jax segment --runtime openvino`, nothing compiled yet": (in_openvino, empty, {}),
        "`sam-jax segment --runtime openvino`, by an earlier run": (in_openvino, full, {}),
        "MobileSAM's own code, PyTorch": (theirs, full, {}),
    }
    taken = {name: [] for name in contenders}
    shares: dict[str, list[dict[str, float]]] = {"nothing compiled": [], "compiled before": []}
    for _ in range(repeat):
        for name, (command, cache, environment) in contenders.items():
            shutil.rmtree(empty, ignore_errors=True)
            taken[name].append(run(command, cache, environment)[:2])
        for name, cache in zip(shares, (empty, full), strict=True):
            shutil.rmtree(empty, ignore_errors=True)
            shares[name].append(json.loads(run(parts, cache)[2]))
    machine = machine_line(("jax", "flax", "torch"))
    table = Table("A click at the shell, from a cold start", COLUMNS, machine)
    for name, times in taken.items():
        seconds, cpu = zip(*times, strict=True)
        cells = statistics.median(seconds), min(seconds), statistics.median(cpu)
        table.add([name, *(f"{cell:.2f} s" for cell in cells)])
    table = Table("Where the seconds go", ("Part", *shares), machine)
    for part in shares["compiled before"][0]:
        medians = (statistics.median(turn[part] for turn in turns) for turns in shares.values())
        table.add([part, *(f"{seconds:.2f} s" for seconds in medians)])


def run(command: list, cache: Path, more: dict[str, str] | None = None) -> tuple:
    """The seconds and the CPU seconds that a process takes, and what it prints."""
    root = Path(__file__).parents[1]
    paths = [str(root / "convert"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"SAM_JAX_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    environment |= more or {}
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(f"{command[0]} failed: {ended.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, ended.stdout


if __name__ == "__main__":
    main()
