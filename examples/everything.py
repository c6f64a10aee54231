"""Finds everything in a photo, without prompts (automatic mask generation).

    python examples/everything.py

Uses the default model (MobileSAM) and a photo from scikit-image. Writes `everything.png`.
"""

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from sam_jax import SamAutomaticMaskGenerator, from_pretrained
from sam_jax.visualize import overlay


def main(output: Path = Path("everything.png"), points_per_side: int = 32) -> None:
    """Finds the masks and draws them next to the photo."""
    image = skimage.data.astronaut()  # 512 x 512, RGB
    generator = SamAutomaticMaskGenerator(from_pretrained("mobile_sam"), points_per_side)
    records = generator.generate(image)
    print(f"{len(records)} masks")

    largest_first = sorted(records, key=lambda record: -record["area"])
    drawn = overlay(image, [record["segmentation"] for record in largest_first])
    Image.fromarray(np.hstack([image, np.asarray(drawn)])).save(output)
    print(output)


if __name__ == "__main__":
    main()
