"""Draws images of stained cells with COCO annotations, to try fine-tuning on.

    python examples/cells.py --output cells

The annotated objects are whole cells. A click at the center of a cell is on its nucleus, so SAM as
often segments the nucleus or a spot. `cells/train.json` and `cells/test.json` are COCO instance
files for the images in `cells/images`.
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
    """Draw images of cells with COCO annotations."""

    output: Path
    """The folder to create."""
    train: int = 64
    """Number of training images."""
    test: int = 16
    """Number of held-out images."""
    seed: int = 0
    """Seed of the images."""


def outline(rng: np.random.Generator, center: np.ndarray, radius: float, waves: float):
    """A closed curve [64, 2] around a center: a circle with a few waves."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radii = np.ones_like(angles)
    for k in range(2, 6):
        radii += waves / k * rng.normal() * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    return center + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def region(polygon: np.ndarray) -> np.ndarray:
    """The mask [h, w] of the pixels inside a curve."""
    mask = Image.new("1", (_SIZE, _SIZE))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in polygon], fill=1)
    return np.asarray(mask)


def texture(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Smooth noise with unit variance."""
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(_SIZE, _SIZE)), scale)
    return noise / noise.std()


def draw(rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draws an image; returns it and the outlines of its cells."""
    image = _TISSUE + 6 * texture(rng, 8)[..., None]
    cells, centers = [], []
    for _ in range(200):
        radius = rng.uniform(26, 46)
        center = rng.uniform(radius, _SIZE - radius, 2)
        if all(np.linalg.norm(center - c) > 1.25 * (radius + r) for c, r in centers):
            centers.append((center, radius))
    for center, radius in centers[:10]:
        cell = outline(rng, center, radius, 0.12)
        cells.append(np.clip(cell, 0, _SIZE - 1))
        color = _CELL + rng.normal(0, 8, 3)
        image[region(cell)] = color
        nucleus = outline(rng, center + rng.normal(0, radius / 12, 2), 0.45 * radius, 0.1)
        image[region(nucleus)] = _NUCLEUS + rng.normal(0, 10, 3)
        for _ in range(3):  # spots
            place = center + rng.normal(0, radius / 2, 2)
            spot = region(outline(rng, place, rng.uniform(2, 5), 0.1)) & region(cell)
            image[spot] = color * rng.uniform(0.5, 0.8)
    image = scipy.ndimage.gaussian_filter(image, (0.8, 0.8, 0))
    image += 5 * texture(rng, 1.5)[..., None] + rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), cells


def write(config: Config, name: str, count: int, rng: np.random.Generator) -> None:
    """Writes `count` images and their COCO file."""
    images, annotations = [], []
    for i in range(count):
        pixels, cells = draw(rng)
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
        sys.exit(f"cells: {config.output} already has images; choose another --output")
    rng = np.random.default_rng(config.seed)
    write(config, "train", config.train, rng)
    write(config, "test", config.test, rng)
    print(config.output)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.splitlines()[0]))
