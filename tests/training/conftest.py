import json

import numpy as np
import pytest
from coco_examples import RECTANGLES, H, W, compressed, rectangle, uncompressed
from PIL import Image
from reference import SHALLOW, meta_sam, ours


@pytest.fixture(scope="module")
def model():
    return ours(meta_sam(SHALLOW), SHALLOW)


@pytest.fixture
def coco(tmp_path):
    """Three images: the first has three objects, the second a crowd and a point, the third two."""
    images, annotations = [], []
    kinds = [
        lambda m, r: [[r[0], r[1], r[2], r[1], r[2], r[3], r[0], r[3]]],
        uncompressed,
        compressed,
    ]

    def as_kind(k, box):
        mask = rectangle(*box)
        return kinds[k](mask, box) if k == 0 else kinds[k](mask)

    for i in range(3):
        array = np.random.default_rng(i).integers(0, 255, (H, W, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        image = {"id": 10 + i, "file_name": f"{i}.png", "height": H, "width": W}
        images.append({**image, "folder": str(tmp_path)})
    for k, box in enumerate(RECTANGLES):
        annotations.append({"image_id": 10, "segmentation": as_kind(k, box), "iscrowd": 0})
    crowd = {"image_id": 11, "segmentation": uncompressed(rectangle(0, 0, 9, 9)), "iscrowd": 1}
    point = {"image_id": 11, "segmentation": [[3, 3, 4, 4, 3, 3]], "iscrowd": 0}
    annotations += [crowd, point]
    annotations += [
        {"image_id": 12, "segmentation": as_kind(1, box), "iscrowd": 0} for box in RECTANGLES[:2]
    ]
    for i, annotation in enumerate(annotations):
        annotation |= {"id": i + 1, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1}
    point["bbox"] = [3, 3, 1, 0]  # like an annotation of COCO itself
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path
