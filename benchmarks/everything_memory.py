"""Peak memory of everything mode above the model's, by points per batch, with and without crops.

    python -m benchmarks.everything_memory

Needs Linux (it reads /proc) and takes some minutes. Uses MobileSAM, a photo of 4000 x 3000 pixels,
32 x 32 points, and run lengths as output.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.common import Table, machine_line

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np, skimage.data
from PIL import Image
from benchmarks.convert_memory import read_status
from sam_jax import SamAutomaticMaskGenerator, from_pretrained

photo = np.asarray(Image.fromarray(skimage.data.coffee()).resize((4000, 3000)))
model = from_pretrained("mobile_sam")
jax.block_until_ready(jax.tree.leaves(jax.tree.map(lambda x: x, model)))
generator = SamAutomaticMaskGenerator(model, output_mode="coco_rle", **eval(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = read_status("self")["VmRSS"]
records = generator.generate(photo)
print(len(records), read_status("self")["VmHWM"] - before)
"""
CROPS = {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2}
RUNS = [{"points_per_batch": n} for n in (1, 64, 1024)]
RUNS += [{"points_per_batch": 64, **CROPS}]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    columns = ("Points per batch", "Crop layers", "Masks", "Peak above the model")
    table = Table("Memory of everything mode", columns, machine_line(), texts=0)
    for options in RUNS:
        command = [sys.executable, "-c", SCRIPT, repr(options)]
        run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        masks, peak = map(int, run.stdout.split())
        layers = options.get("crop_n_layers", 0)
        table.add([options["points_per_batch"], layers, masks, f"{peak / 1e9:.2f} GB"])


if __name__ == "__main__":
    main()
