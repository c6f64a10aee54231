import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cores import all_cores
from everything import random_image
from folders import OPTIONS
from PIL import Image

from sam_jax import MissingExtra, from_pretrained
from sam_jax.automatic.folder import generate_folder
from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.ray_cluster import generate_with_ray
from sam_jax.automatic.results import Results

pytestmark = pytest.mark.slow


# Runs in its own process, since starting nodes forks it, which JAX does not support.
CLUSTER = """
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""


# `Results`, which Ray pickles, that kill their worker at one image, or raise a Python error.
POISONED = """
import os, sys
from pathlib import Path
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.ray_cluster import generate_with_ray
from sam_jax.automatic.results import Results

class Poisoned(Results):
    def write(self, image, *others):
        with open(self.folder / "writes", "a") as file:
            file.write(image.stem + " ")
        if image.stem == "tall":
            os.kill(os.getpid(), 9)
        if self.overlays:
            raise RuntimeError("the cause")
        super().write(image, *others)

address, model, photos, output = sys.argv[1:]
options = MaskGenerationOptions(1, output_mode="uncompressed_rle")
names = [Path(photos, f"{name}.png") for name in ("tall", "bad", "wide", "small")]
for names, breaks in ((names, False), (names[-1:], True)):
    results = Poisoned(Path(output, str(breaks)), "coco", breaks)
    results.begin({}, [])
    try:
        generate_with_ray(
            address, model, "float32", options, names, results, lambda: print("image"), print
        )
    except ValueError as error:
        print(error)
"""


def ray_workers():
    """Process ids of Ray's workers, found by their process titles."""
    workers = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = status.read_bytes()
        except OSError:  # it has just ended
            continue
        if name.startswith(b"ray::") and b"MapWorker" in name:
            workers.append(int(status.parent.name))
    return workers


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_two_machines_with_a_killed_worker(model, photos, tmp_path):
    """A Ray cluster of two nodes writes every image once, although a worker is killed."""
    for i in range(20):
        Image.fromarray(random_image(40, 50, seed=i)).save(photos / f"more_{i:02}.png")
    (photos / "bad.png").write_text("no image")
    with all_cores():
        cluster = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    try:
        address = cluster.stdout.readline().strip()
        command = [sys.executable, "-m", "sam_jax.cli", "generate", photos, "--output"]
        command += [tmp_path / "out", "--model", model, *OPTIONS, "--format", "coco"]
        command += ["--ray", address]
        process = subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        parts = tmp_path / "out/parts"
        deadline = time.monotonic() + 120
        while len(list(parts.glob("[!.]*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = ray_workers()
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        done = len(list(parts.glob("[!.]*.json")))
        assert done < 23, "all was done before a worker could be killed"
        printed, errors = process.communicate(timeout=180)
        poisoned = [sys.executable, "-c", POISONED, address, model, photos, tmp_path / "poisoned"]
        ended = subprocess.run(
            [str(c) for c in poisoned], stdout=subprocess.PIPE, text=True, timeout=240
        )
        outcome = ended.stdout
    finally:
        cluster.communicate("\n", timeout=60)
    assert ended.returncode == 0, outcome
    assert process.returncode == 1, errors
    assert "1 image failed:" in errors
    assert f"  {photos / 'bad.png'}: " in errors
    assert "23 of 24 images" in printed
    coco = json.loads((tmp_path / "out/annotations.json").read_text())
    names = [image["file_name"] for image in coco["images"]]
    assert len(names) == len(set(names)) == 23

    # An image that kills its worker is tried three times. The others succeed; errors have causes.
    lines = [line for line in outcome.splitlines() if line != "image" and "raylet" not in line]
    assert outcome.splitlines().count("image") == 4
    (bad,) = (line for line in lines if line.startswith(f"{photos / 'bad.png'} "))
    assert "is not an image of a known format" in bad
    (tall,) = (line for line in lines if line.startswith(f"{photos / 'tall.png'} "))
    assert "its worker died at each of 3 tries" in tall
    writes = (tmp_path / "poisoned/False/writes").read_text().split()
    assert sorted(writes) == ["small", "tall", "tall", "tall", "wide"]
    assert {p.stem for p in (tmp_path / "poisoned/False/parts").iterdir()} == {"small", "wide"}
    assert lines[-1].endswith(f"failed at {photos / 'small.png'}: RuntimeError: the cause")

    alone = Results(tmp_path / "alone", "coco")
    alone.begin({}, [])
    generator = SamAutomaticMaskGenerator(
        from_pretrained(model),
        pred_iou_thresh=0,
        stability_score_thresh=0,
        points_per_side=4,
        output_mode="uncompressed_rle",
    )
    generate_folder(generator, [photos / "wide.png"], alone, lambda: None, lambda *_: None)
    expected = json.loads((tmp_path / "alone/parts/wide.json").read_text())
    assert json.loads((parts / "wide.json").read_text()) == expected


def test_ray_takes_one_address(run):
    assert "--ray is 'a b', expected one address or none" in run("--ray", "a", "b")[0]


def test_without_ray(monkeypatch, tmp_path):
    for name in ("ray", "ray.data", "ray.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    results = Results(tmp_path, "coco")
    with pytest.raises(MissingExtra, match=r'ray is not installed; .*"sam_jax\[ray\]"'):
        generate_with_ray(
            None, "mobile_sam", "float32", MaskGenerationOptions(), [], results, print, print
        )
