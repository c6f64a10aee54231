"""Draws pictures of stained cells with COCO annotations, to try fine-tuning on.

    python examples/cells.py --output cells

A click in the middle of such a cell is on its nucleus, and SAM takes that, or one of its spots, for
the object as often as the whole cell, which is what is annotated. `cells/train.json` and
`cells/test.json` are COCO instance files, of the images in `cells/images`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
import tyro
from PIL import Image, ImageDraw

_SIZE = 384
_TISSUE, _CELL, _NUCLEUS = np.array([[238, 222, 232], [222, 150, 190], [110, 60, 150]], float)


@dataclass(frozen=True)
class Config:
    """Draw pictures of cells with COCO annotations."""

    output: Path
    """A new folder."""
    train: int = 64
    """Pictures to train on."""
    test: int = 16
    """Pictures held out."""
    seed: int = 0
    """What is drawn depends on it."""


def outline(rng: np.random.Generator, centre: np.ndarray, radius: float, waves: float):
    """A closed curve around a centre, [64, 2]: a circle with a few waves."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radii = np.ones_like(angles)
    for k in range(2, 6):
        radii += waves / k * rng.normal() * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    return centre + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def region(polygon: np.ndarray) -> np.ndarray:
    """The pixels within a curve."""
    mask = Image.new("1", (_SIZE, _SIZE))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in polygon], fill=1)
    return np.asarray(mask)


def texture(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Smooth noise of unit variance."""
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(_SIZE, _SIZE)), scale)
    return noise / noise.std()


def picture(rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """A picture, and the outlines of its cells."""
    image = _TISSUE + 6 * texture(rng, 8)[..., None]
    cells, centres = [], []
    for _ in range(200):
        radius = rng.uniform(26, 46)
        centre = rng.uniform(radius, _SIZE - radius, 2)
        if all(np.linalg.norm(centre - c) > 1.25 * (radius + r) for c, r in centres):
            centres.append((centre, radius))
    for centre, radius in centres[:10]:
        cell = outline(rng, centre, radius, 0.12)
        cells.append(np.clip(cell, 0, _SIZE - 1))
        colour = _CELL + rng.normal(0, 8, 3)
        image[region(cell)] = colour
        nucleus = outline(rng, centre + rng.normal(0, radius / 12, 2), 0.45 * radius, 0.1)
        image[region(nucleus)] = _NUCLEUS + rng.normal(0, 10, 3)
        for _ in range(3):  # spots
            place = centre + rng.normal(0, radius / 2, 2)
            spot = region(outline(rng, place, rng.uniform(2, 5), 0.1)) & region(cell)
            image[spot] = colour * rng.uniform(0.5, 0.8)
    image = scipy.ndimage.gaussian_filter(image, (0.8, 0.8, 0))
    image += 5 * texture(rng, 1.5)[..., None] + rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), cells


def write(config: Config, name: str, count: int, rng: np.random.Generator) -> None:
    """Writes pictures and their COCO file."""
    images, annotations = [], []
    for i in range(count):
        pixels, cells = picture(rng)
        file = f"{name}_{i:03}.png"
        Image.fromarray(pixels).save(config.output / "images" / file)
        images.append({"id": i, "file_name": file, "height": _SIZE, "width": _SIZE})
        for cell in cells:
            low, high = cell.min(0), cell.max(0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": [cell.round(2).ravel().tolist()],
                    "bbox": [*low.round(2).tolist(), *(high - low).round(2).tolist()],
                    "area": int(region(cell).sum()),
                }
            )
    categories = [{"id": 1, "name": "cell"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (config.output / f"{name}.json").write_text(json.dumps(content))


def main(config: Config) -> None:
    """Draws both sets."""
    try:
        (config.output / "images").mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"cells: {config.output} has pictures already; choose another --output")
    rng = np.random.default_rng(config.seed)
    write(config, "train", config.train, rng)
    write(config, "test", config.test, rng)
    print(config.output)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.splitlines()[0]))
