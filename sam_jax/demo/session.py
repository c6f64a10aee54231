"""What the demo page shows, as pure functions: an image, its prompts, and the masks.

A visitor's image is embedded once. A `Session` has its embedding and the prompts so far. The
functions take and return sessions; they modify nothing in place and use no global state.
"""

import dataclasses
import io
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from PIL import Image
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.config import SamConfig
from sam_jax.image import load_image, open_image
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import FOREGROUND
from sam_jax.ops.rle import rle_area, rle_compress, rle_encode, rle_uncompress
from sam_jax.predictor import SamPredictor
from sam_jax.processing import SamProcessor
from sam_jax.visualize import ALPHA, COLORS, outline

# Formats whose decoding cost is bounded by the number of pixels in the header and the size of the
# file, except for files that `_check_cost` rejects.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
PIXELS = 50_000_000  # limit for an image, and for a tile of a TIFF, which is decoded whole
SCANS = 50  # limit for a JPEG: each scan visits all pixels; progressive JPEGs have about 10
MARKS = 31  # limit of points and boxes: more would compile again, and each keeps 256 KB
SHOWN = 1600  # longest side in pixels of the image sent to the browser


class Point(NamedTuple):
    """A point in pixels of the image; label 1 is foreground, 0 background."""

    x: int
    y: int
    label: int


class Box(NamedTuple):
    """A box in pixels of the image."""

    x0: int
    y0: int
    x1: int
    y1: int


class Prediction(NamedTuple):
    """The candidates for a prompt, sorted by predicted IoU, highest first."""

    masks: np.ndarray  # [m, h, w] booleans, at the size of the model's input
    scores: np.ndarray  # [m]
    logits: np.ndarray  # [m, 256, 256]


@dataclass(frozen=True)
class EmbeddedImage:
    """An image's embedding [1, c, g, g] and size (h, w)."""

    embedding: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A point or a box, and the mask that was shown when it was added."""

    prompt: Point | Box
    refines: np.ndarray | None = None  # logits [1, 256, 256] of that mask, if the prompt refines it
    chosen: int = 0  # index of the candidate that was shown


@dataclass(frozen=True)
class Session:
    """An image, its prompts in the order in which they were added, and the model's prediction."""

    image: EmbeddedImage
    steps: tuple[Step, ...] = ()
    prediction: Prediction | None = None
    chosen: int = 0  # index of the candidate that is shown

    @property
    def points(self) -> list[Point]:
        """All points."""
        return [s.prompt for s in self.steps if isinstance(s.prompt, Point)]

    @property
    def box(self) -> Box | None:
        """The last box, which replaces earlier ones."""
        return next((s.prompt for s in reversed(self.steps) if isinstance(s.prompt, Box)), None)


@dataclass(frozen=True)
class Found:
    """An image's records of everything mode, with COCO's compressed run lengths."""

    image: EmbeddedImage
    records: list[dict[str, Any]]


def open_image_file(predictor: SamPredictor, content: bytes) -> tuple[EmbeddedImage, Image.Image]:
    """Embeds the image in a file's content; also returns the image in the size that is shown.

    The predictor has no image afterwards.

    Raises:
        TypeError, ValueError: if the file is not an image, or the image is too large.
    """
    file = io.BytesIO(content)
    with open_image(file) as head:
        if head.format not in FORMATS:
            raise ValueError(f"the file's format is {head.format}, expected {', '.join(FORMATS)}")
        if head.width * head.height > PIXELS:
            raise ValueError(
                f"the image has {head.width} x {head.height} pixels, expected at most "
                f"{PIXELS // 10**6} million; make it smaller first"
            )
        _check_cost(head, content)
    array = load_image(file)
    predictor.set_image(array)
    image = EmbeddedImage(predictor.get_image_embedding(), array.shape[:2])
    predictor.reset_image()
    shown = Image.fromarray(array)
    shown.thumbnail((SHOWN, SHOWN))
    return image, shown


def _check_cost(head: Image.Image, content: bytes) -> None:
    """Rejects files with few pixels that take a long time or much memory to decode."""
    if head.format in ("JPEG", "MPO") and (scans := _count_scans(content)) > SCANS:
        raise ValueError(
            f"the JPEG has {scans} scans, expected at most {SCANS}; save the image again, for "
            "example as a PNG"
        )
    if isinstance(head, TiffImageFile) and not _has_small_tiles(head, content):
        raise ValueError(
            f"the TIFF has tiles of more than {PIXELS // 10**6} million pixels, or of an unclear "
            "size; save the image again, for example as a PNG"
        )


def _count_scans(content: bytes) -> int:
    """The number of scans in a JPEG, or in the first image of an MPO."""
    scans = position = 0
    # Markers of segments, which begin with their length; markers within a scan's data have none.
    marker = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
    while (found := marker.search(content, position)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans


def _has_small_tiles(head: TiffImageFile, content: bytes) -> bool:
    """Whether the tiles of a TIFF, if it has any, are certain to be small.

    If a tag is repeated, Pillow takes the last one and the decoder the first, and the decoder knows
    more types. So each tag must occur once and be a plain number.
    """
    order, is_big = "<" if content[:1] == b"I" else ">", content[2:4] in (b"+\0", b"\0+")
    (start,) = struct.unpack_from(order + "IQ"[is_big], content, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + "HQ"[is_big], content, start)
    entry, start = struct.Struct(order + ("HHI4x", "HHQ8x")[is_big]), start + (8 if is_big else 2)
    count = min(count, (len(content) - start) // entry.size)
    entries = entry.iter_unpack(content[start : start + count * entry.size])
    tags = [found for found in entries if found[0] in (TILEWIDTH, TILELENGTH)]
    if not all(kind in (3, 4) and length == 1 for _, kind, length in tags):  # SHORT or LONG
        return False
    if sorted(tag for tag, *_ in tags) not in ([], [TILEWIDTH, TILELENGTH]):
        return False
    return not tags or head.tag_v2[TILEWIDTH] * head.tag_v2[TILELENGTH] <= PIXELS


def add_point(session: Session, x: float, y: float, label: int) -> Session:
    """Adds a point, which refines the mask that is shown.

    A point outside the image is moved to its edge.

    Raises:
        ValueError: if there are too many points and boxes.
    """
    height, width = session.image.size
    point, refines = Point(_clip(x, width), _clip(y, height), label), None
    if session.prediction is not None:
        refines = session.prediction.logits[session.chosen][None].copy()
    return _add(session, Step(point, refines, session.chosen))


def add_box(session: Session, x0: float, y0: float, x1: float, y1: float) -> Session:
    """Adds a box between any two opposite corners; it replaces an earlier box.

    A box defines the object, so it does not refine the mask that is shown.

    Raises:
        ValueError: if there are too many points and boxes.
    """
    height, width = session.image.size
    xs, ys = sorted(_clip(x, width) for x in (x0, x1)), sorted(_clip(y, height) for y in (y0, y1))
    return _add(session, Step(Box(xs[0], ys[0], xs[1], ys[1]), None, session.chosen))


def _add(session: Session, step: Step) -> Session:
    if len(session.steps) == MARKS:
        raise ValueError(f"there are already {MARKS} points and boxes, the maximum; undo some")
    return Session(session.image, (*session.steps, step))


def _clip(value: float, size: int) -> int:
    if not math.isfinite(value):
        raise ValueError(f"a coordinate is {value}, expected a finite number")
    return int(min(max(value, 0), size - 1))


def undo(session: Session) -> Session:
    """Removes the last prompt, which restores the candidate shown before it and an earlier box."""
    if not session.steps:
        return session
    return Session(session.image, session.steps[:-1], chosen=session.steps[-1].chosen)


def clear(session: Session) -> Session:
    """Removes all prompts."""
    return Session(session.image)


def prompt_of(session: Session) -> dict[str, Any]:
    """The session's points and box as arguments of `SamPredictor.predict`."""
    prompt: dict[str, Any] = {}
    if session.points:
        prompt["point_coords"] = [[p.x, p.y] for p in session.points]
        prompt["point_labels"] = [p.label for p in session.points]
    if session.box:
        prompt["box"] = list(session.box)
    # Only a single point is ambiguous.
    return prompt | {"multimask_output": len(session.points) == 1 and not session.box}


def predict(model: Sam, session: Session) -> Session:
    """Adds the prediction for the session's prompts.

    The masks have the size of the model's input, without its padding, so that one compiled program
    serves images of every size. Their logits are those for the image itself.
    """
    if not session.steps:
        return Session(session.image)
    predictor = SamPredictor(model)
    processor, size = predictor.processor, session.image.size
    predictor.set_image_embedding(session.image.embedding, (model.config.image_size,) * 2)

    def scaled(coords: list) -> np.ndarray:
        return processor.scale_coords(np.array(coords, np.float64).reshape(-1, 2), size)

    prompt = prompt_of(session)
    if session.points:
        prompt["point_coords"] = scaled(prompt["point_coords"])
    if session.box:
        prompt["box"] = scaled(prompt["box"]).reshape(4)
    masks, scores, logits = predictor.predict(**prompt, mask_input=session.steps[-1].refines)
    order = np.argsort(-scores)
    height, width = processor.input_size(size)
    prediction = Prediction(masks[order, :height, :width], scores[order], logits[order])
    return dataclasses.replace(session, prediction=prediction)


def choose(session: Session, candidate: int) -> Session:
    """Shows another candidate; the first one follows the last."""
    count = len(session.prediction.scores) if session.prediction else 1
    return dataclasses.replace(session, chosen=candidate % count)


def full_mask(model: Sam, session: Session) -> Bool[np.ndarray, "h w"]:
    """The mask that is shown, at the image's own size."""
    processor, size = SamProcessor(model.config), session.image.size
    assert session.prediction is not None
    logits = session.prediction.logits[None, session.chosen : session.chosen + 1]
    ((mask,),) = processor.post_process_masks([logits], [size], [processor.input_size(size)])[0]
    return mask


def find_everything(
    model: Sam,
    image: EmbeddedImage,
    points_per_side: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> Found:
    """Everything mode; see `SamAutomaticMaskGenerator.generate_from_embedding`."""
    # Small batches on a CPU, where larger ones are not faster: clicks are served between them.
    (device, *_) = jax.tree.leaves(model)[0].devices()
    batch_size = 8 if device.platform == "cpu" else 64
    generator = SamAutomaticMaskGenerator(
        model, points_per_side, points_per_batch=batch_size, output_mode="coco_rle"
    )
    return Found(
        image, generator.generate_from_embedding(image.embedding, image.size, on_batch=on_batch)
    )


def number_masks(found: Found) -> np.ndarray:
    """uint16 [h, w]: 1 + the index of the mask's record at each pixel, 0 for none.

    Smaller masks lie on top of larger ones.
    """
    height, width = found.image.size
    numbers = np.zeros(height * width, np.uint16)  # column by column, like run lengths
    for i in sorted(range(len(found.records)), key=lambda i: -found.records[i]["area"]):
        ends = np.cumsum(rle_uncompress(found.records[i]["segmentation"])["counts"]).tolist()
        for start, end in zip(ends[::2], ends[1::2], strict=False):  # the last run may be zeros
            numbers[start:end] = i + 1
    return numbers.reshape(width, height).T


def draw_layer(numbers: np.ndarray) -> Image.Image:
    """The layer over the image that is shown: masks tinted and outlined, all else transparent.

    Args:
        numbers: integers [h, w], 0 outside all masks, another number for each mask.
    """
    scale = min(1, SHOWN / max(numbers.shape))
    rows, columns = (
        np.arange(max(1, round(n * scale))) * n // max(1, round(n * scale)) for n in numbers.shape
    )
    numbers = numbers[rows][:, columns]
    colors = _color_indices(numbers)
    for number in np.unique(numbers[numbers > 0]):
        inside = numbers == number
        for _ in range(max(1, round(max(numbers.shape) / 512))):  # the same thickness at all sizes
            rim = outline(inside)
            colors[rim] = len(COLORS) + 1
            inside = inside & ~rim
    layer = _paint(colors, [*COLORS, (255, 255, 255)])
    layer.info["transparency"] = bytes([0, *[round(255 * ALPHA)] * len(COLORS), 255])
    return layer


def label_image(numbers: np.ndarray) -> Image.Image:
    """An image whose pixels are the numbers of masks (uint16), colored to tell them apart.

    More than 255 masks need 16 bits and have no colors.
    """
    if numbers.max(initial=0) > 255:
        return Image.fromarray(numbers)
    return _paint(numbers.astype(np.uint8), [COLORS[i % len(COLORS)] for i in range(255)])


def _color_indices(numbers: np.ndarray) -> np.ndarray:
    """0 outside all masks, otherwise 1 to the number of colors."""
    numbers = numbers.astype(np.int32)
    return np.where(numbers > 0, 1 + (numbers - 1) % len(COLORS), 0).astype(np.uint8)


def _paint(indices: np.ndarray, colors: list) -> Image.Image:
    """A palette image: black for 0, the first color for 1, and so on."""
    image = Image.fromarray(indices)
    image.putpalette([value for color in ((0, 0, 0), *colors) for value in color])
    return image


def prompt_json(session: Session, mask: np.ndarray) -> dict[str, Any]:
    """The session's mask and how to reproduce it; masks are listed as in `everything_json`.

    `steps` are the points and boxes in order. Each point is predicted together with the earlier
    ones and with the logits of the mask shown before it, that of `candidate`, as `mask_input`.
    """
    assert session.prediction is not None
    rle = rle_encode(mask)
    record = {
        "segmentation": rle_compress(rle),
        "area": rle_area(rle),
        "predicted_iou": float(session.prediction.scores[session.chosen]),
    }
    height, width = session.image.size
    shown = [*(step.chosen for step in session.steps[1:]), session.chosen]
    steps = [
        {"box" if isinstance(s.prompt, Box) else "point": list(s.prompt), "candidate": chosen}
        for s, chosen in zip(session.steps, shown, strict=True)
    ]
    prompt = prompt_of(session)
    return {"width": width, "height": height, "prompt": prompt, "steps": steps, "masks": [record]}


def everything_json(found: Found) -> dict[str, Any]:
    """The records; each `segmentation` has the form that `pycocotools.mask` takes."""
    height, width = found.image.size
    return {"width": width, "height": height, "masks": found.records}


def embed_blank(predictor: SamPredictor) -> None:
    """Embeds an image without content, which compiles the encoder; the predictor has none then."""
    side = predictor.config.image_size
    predictor.set_image(np.zeros((side, side, 3), np.uint8))
    predictor.reset_image()


def blank_sessions(config: SamConfig) -> list[Session]:
    """Sessions of a blank image, whose predictions need all programs that clicks need."""
    side, low, grid = config.image_size, config.mask_size, config.image_embedding_size
    embedding = np.zeros((1, config.image_embedding_channels, grid, grid), np.float32)
    image = EmbeddedImage(embedding, (side, side))
    point, box = Step(Point(0, 0, FOREGROUND)), Step(Box(0, 0, side - 1, side - 1))
    refining = dataclasses.replace(point, refines=np.zeros((1, low, low), np.float32))
    sessions = [Session(image, (point,)), Session(image, (box,))]
    # With the box's two corners these are powers of two, to which other numbers are padded.
    for points in (2, 6, 14, MARKS - 1):
        sessions.append(Session(image, (*[point] * points, box)))
        sessions.append(Session(image, (box, *[point] * (points - 1), refining)))
    return sessions
