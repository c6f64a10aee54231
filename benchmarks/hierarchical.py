"""What the option `hierarchical` of everything mode saves and what it loses, with MobileSAM.

    python -m benchmarks.hierarchical

Points: how many of the grid's 1,024 are measured. Found: masks of the full grid that `hierarchical`
finds, too (IoU at least 0.9). New: its other masks. The full grid and `hierarchical` take turns,
warm; the table has the medians of whole calls of `generate`. In addition to photos, there are
images from a microscope, a telescope and a fundus camera.
"""

import argparse

import matplotlib.cbook
import numpy as np
import skimage.data

from benchmarks.common import (
    Table,
    check_at_least_one,
    machine_line,
    match,
    matrix_rate,
    photos,
    timed,
)
from sam_jax import SamAutomaticMaskGenerator, SamPredictor, from_pretrained, load_image

COLUMNS = ("Image", "Points", "Masks", "Found", "New", "Full grid", "hierarchical", "Ratio")


def images() -> dict[str, np.ndarray]:
    """Photos and other images from the wheels of scikit-image and matplotlib."""
    hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    names = ("chelsea", "immunohistochemistry", "retina", "hubble_deep_field")
    more = {name: getattr(skimage.data, name)() for name in ("astronaut", *names)}
    return photos() | {"grace_hopper": load_image(hopper)} | more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="turns; the medians count")
    repeat = parser.parse_args().repeat
    check_at_least_one(parser, repeat=repeat)
    model = from_pretrained("mobile_sam")
    predictor = SamPredictor(model)
    options = {"output_mode": "coco_rle"}
    full = SamAutomaticMaskGenerator(model, **options)
    coarse = SamAutomaticMaskGenerator(model, **options, hierarchical=True)
    single = SamAutomaticMaskGenerator(model, points_per_batch=1, hierarchical=True)

    machine = machine_line(("jax",), matrix_rate())
    table = Table("Everything mode with a hierarchical grid", COLUMNS, machine)
    for name, image in images().items():
        predictor.set_image(image)
        steps = []
        single.generate_from_embedding(
            predictor.get_image_embedding(),
            image.shape[:2],
            on_batch=lambda *step, steps=steps: steps.append(step),
        )
        expected, actual = (generator.generate(image) for generator in (full, coarse))
        found = int((match(actual, expected)[0] >= 0.9).sum())
        turns = [[timed(g.generate, image)[1] for g in (full, coarse)] for _ in range(repeat)]
        slow, fast = np.median(turns, axis=0)
        counts = steps[-1][1], len(expected), found, len(actual) - found
        times = f"{slow:.1f} s", f"{fast:.1f} s", f"{slow / fast:.2f}"
        table.add([name, *map(str, counts), *times])


if __name__ == "__main__":
    main()
