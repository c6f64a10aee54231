"""What the demo page shows, as pure functions: an image, its prompts, and the masks.

A visitor's image is embedded once. Its embedding and the prompts so far are a `Visit`, which
everything here takes and gives; nothing is changed in place and nothing is global.
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
from sam_jax.image import load_image, open_image
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import FOREGROUND
from sam_jax.ops.rle import rle_area, rle_compress, rle_encode, rle_uncompress
from sam_jax.predictor import SamPredictor
from sam_jax.processing import SamProcessor
from sam_jax.visualize import ALPHA, COLORS, outline

# The cost of decoding these grows with the pixels that the head of the file says, and with the size
# of the file, but for what `_check_cost` refuses.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
PIXELS = 50_000_000  # the most that an image may have, or a tile of a TIFF, which is decoded whole
SCANS = 50  # of a JPEG, each of which goes through all pixels; progressive ones have about 10
MARKS = 31  # the most points and boxes: more would compile again, and each keeps 256 KB
SHOWN = 1600  # pixels along the longest side of the image that the browser gets


class Point(NamedTuple):
    """In pixels of the picture; label 1 is on the object, 0 is not."""

    x: int
    y: int
    label: int


class Box(NamedTuple):
    """In pixels of the picture."""

    x0: int
    y0: int
    x1: int
    y1: int


class Answer(NamedTuple):
    """The candidates for a prompt, the best predicted IoU first."""

    masks: np.ndarray  # [m, h, w] booleans, of the picture as large as the model sees it
    scores: np.ndarray  # [m]
    logits: np.ndarray  # [m, 256, 256]


@dataclass(frozen=True)
class Picture:
    """A picture's embedding [1, c, g, g] and its (h, w)."""

    embedding: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A point or a box, and what it was added to."""

    prompt: Point | Box
    refines: np.ndarray | None = None  # logits [1, 256, 256] of the mask that was shown
    chosen: int = 0  # which candidate that was


@dataclass(frozen=True)
class Visit:
    """An image, its prompts in the order they were given, and the answer to them."""

    picture: Picture
    steps: tuple[Step, ...] = ()
    answer: Answer | None = None
    chosen: int = 0  # which of the answer's candidates is shown

    @property
    def points(self) -> list[Point]:
        """All points."""
        return [s.prompt for s in self.steps if isinstance(s.prompt, Point)]

    @property
    def box(self) -> Box | None:
        """The last box, which takes the place of those before."""
        return next((s.prompt for s in reversed(self.steps) if isinstance(s.prompt, Box)), None)


@dataclass(frozen=True)
class Found:
    """A picture's records of everything-mode, with COCO's run lengths as strings."""

    picture: Picture
    records: list[dict[str, Any]]


def open_picture(model: Sam, content: bytes) -> tuple[Picture, Image.Image]:
    """An image file's embedding, and the image as it is shown.

    Raises:
        TypeError, ValueError: for files that are not an image, and for images that are too large.
    """
    file = io.BytesIO(content)
    with open_image(file) as head:
        if head.format not in FORMATS:
            raise ValueError(f"the file is a {head.format}, expected {', '.join(FORMATS)}")
        if head.width * head.height > PIXELS:
            raise ValueError(
                f"the image has {head.width} x {head.height} pixels, expected at most "
                f"{PIXELS // 10**6} million; make it smaller first"
            )
        _check_cost(head, content)
    array = load_image(file)
    predictor = SamPredictor(model)
    predictor.set_image(array)
    picture = Picture(predictor.get_image_embedding(), array.shape[:2])
    shown = Image.fromarray(array)
    shown.thumbnail((SHOWN, SHOWN))
    return picture, shown


def _check_cost(head: Image.Image, content: bytes) -> None:
    """Refuses files of few pixels that take long to decode, or much memory."""
    if head.format in ("JPEG", "MPO") and (scans := _count_scans(content)) > SCANS:
        raise ValueError(
            f"the JPEG has {scans} scans, expected at most {SCANS}; save the image again, as a PNG "
            "for instance"
        )
    if isinstance(head, TiffImageFile) and not _has_small_tiles(head, content):
        raise ValueError(
            f"the TIFF has tiles of more than {PIXELS // 10**6} million pixels, or of an unclear "
            "size; save the image again, as a PNG for instance"
        )


def _count_scans(content: bytes) -> int:
    """How many scans a JPEG has, or the first image of an MPO."""
    scans = position = 0
    # The markers of segments, which begin with their length; those within a scan's data have none.
    marker = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
    while (found := marker.search(content, position)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans


def _has_small_tiles(head: TiffImageFile, content: bytes) -> bool:
    """Whether the tiles of a TIFF, if it has any, are small for sure.

    Of several tags Pillow takes the last and the decoder the first, and the decoder knows more
    types: so each is to be there once, and a plain number.
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


def add_point(visit: Visit, x: float, y: float, label: int) -> Visit:
    """With one more point, which refines the mask that is shown.

    A point outside of the image moves to its edge.

    Raises:
        ValueError: if there are too many.
    """
    height, width = visit.picture.size
    refines = None if visit.answer is None else visit.answer.logits[visit.chosen][None].copy()
    return _add(visit, Step(Point(_clip(x, width), _clip(y, height), label), refines, visit.chosen))


def add_box(visit: Visit, x0: float, y0: float, x1: float, y1: float) -> Visit:
    """With a box between any two corners, in the place of an earlier one.

    A box says what the object is: it does not refine the mask that is shown.

    Raises:
        ValueError: if there are too many.
    """
    height, width = visit.picture.size
    xs, ys = sorted(_clip(x, width) for x in (x0, x1)), sorted(_clip(y, height) for y in (y0, y1))
    return _add(visit, Step(Box(xs[0], ys[0], xs[1], ys[1]), None, visit.chosen))


def _add(visit: Visit, step: Step) -> Visit:
    if len(visit.steps) == MARKS:
        raise ValueError(f"there are {MARKS} points and boxes, the most there can be; undo some")
    return Visit(visit.picture, (*visit.steps, step))


def _clip(value: float, size: int) -> int:
    if not math.isfinite(value):
        raise ValueError(f"a coordinate is {value}, expected a finite number")
    return int(min(max(value, 0), size - 1))


def undo(visit: Visit) -> Visit:
    """Without the last prompt: what was shown before, and an earlier box, are in force again."""
    if not visit.steps:
        return visit
    return Visit(visit.picture, visit.steps[:-1], chosen=visit.steps[-1].chosen)


def clear(visit: Visit) -> Visit:
    """Without prompts."""
    return Visit(visit.picture)


def prompt_of(visit: Visit) -> dict[str, Any]:
    """What `SamPredictor.predict` takes for the visit's prompts; points and a box."""
    prompt: dict[str, Any] = {}
    if visit.points:
        prompt["point_coords"] = [[p.x, p.y] for p in visit.points]
        prompt["point_labels"] = [p.label for p in visit.points]
    if visit.box:
        prompt["box"] = list(visit.box)
    # A single point is ambiguous, all else is not.
    return prompt | {"multimask_output": len(visit.points) == 1 and not visit.box}


def answer(model: Sam, visit: Visit) -> Visit:
    """With the answer to its prompts.

    The masks are as large as the model sees the image, with its padding, which is cut off: one
    program for images of every size. Their logits are those for the image itself.
    """
    if not visit.steps:
        return Visit(visit.picture)
    predictor = SamPredictor(model)
    processor, size = predictor.processor, visit.picture.size
    predictor.set_image_embedding(visit.picture.embedding, (model.config.image_size,) * 2)

    def scaled(coords: list) -> np.ndarray:
        return processor.scale_coords(np.array(coords, np.float64).reshape(-1, 2), size)

    prompt = prompt_of(visit)
    if visit.points:
        prompt["point_coords"] = scaled(prompt["point_coords"])
    if visit.box:
        prompt["box"] = scaled(prompt["box"]).reshape(4)
    masks, scores, logits = predictor.predict(**prompt, mask_input=visit.steps[-1].refines)
    order = np.argsort(-scores)
    height, width = processor.input_size(size)
    answer = Answer(masks[order, :height, :width], scores[order], logits[order])
    return dataclasses.replace(visit, answer=answer)


def choose(visit: Visit, candidate: int) -> Visit:
    """With another candidate; after the last comes the first."""
    count = len(visit.answer.scores) if visit.answer else 1
    return dataclasses.replace(visit, chosen=candidate % count)


def full_mask(model: Sam, visit: Visit) -> Bool[np.ndarray, "h w"]:
    """The candidate that is shown, at the picture's own size."""
    processor, size = SamProcessor(model.config), visit.picture.size
    assert visit.answer is not None
    logits = visit.answer.logits[None, visit.chosen : visit.chosen + 1]
    ((mask,),) = processor.post_process_masks([logits], [size], [processor.input_size(size)])[0]
    return mask


def find_everything(
    model: Sam,
    picture: Picture,
    points_per_side: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> Found:
    """Everything mode; see `SamAutomaticMaskGenerator.generate_from_embedding`."""
    # Short steps on a CPU, where more points at once are not faster: clicks come in between.
    (device, *_) = jax.tree.leaves(model)[0].devices()
    at_once = 8 if device.platform == "cpu" else 64
    generator = SamAutomaticMaskGenerator(
        model, points_per_side, points_per_batch=at_once, output_mode="coco_rle"
    )
    return Found(
        picture,
        generator.generate_from_embedding(picture.embedding, picture.size, on_batch=on_batch),
    )


def number_masks(found: Found) -> np.ndarray:
    """uint16 [h, w]: 1 + the index of the record whose mask is there, 0 for none.

    Smaller masks lie on larger ones.
    """
    height, width = found.picture.size
    numbers = np.zeros(height * width, np.uint16)  # column by column, as run lengths are
    for i in sorted(range(len(found.records)), key=lambda i: -found.records[i]["area"]):
        ends = np.cumsum(rle_uncompress(found.records[i]["segmentation"])["counts"]).tolist()
        for start, end in zip(ends[::2], ends[1::2], strict=False):  # zeros may be last
            numbers[start:end] = i + 1
    return numbers.reshape(width, height).T


def draw_layer(numbers: np.ndarray) -> Image.Image:
    """What lies on the picture that is shown: masks tinted and outlined, all else transparent.

    Args:
        numbers: integers [h, w], 0 where there is no mask, another for each mask.
    """
    scale = min(1, SHOWN / max(numbers.shape))
    rows, columns = (
        np.arange(max(1, round(n * scale))) * n // max(1, round(n * scale)) for n in numbers.shape
    )
    numbers = numbers[rows][:, columns]
    colors = _color_indices(numbers)
    for number in np.unique(numbers[numbers > 0]):
        inside = numbers == number
        for _ in range(max(1, round(max(numbers.shape) / 512))):  # as thick whatever the size
            rim = outline(inside)
            colors[rim] = len(COLORS) + 1
            inside = inside & ~rim
    layer = _paint(colors, [*COLORS, (255, 255, 255)])
    layer.info["transparency"] = bytes([0, *[round(255 * ALPHA)] * len(COLORS), 255])
    return layer


def label_picture(numbers: np.ndarray) -> Image.Image:
    """Numbers of masks, uint16, as a picture with these as its pixels, coloured to tell them apart.

    More than 255 masks take 16 bits, which have no colours.
    """
    if numbers.max(initial=0) > 255:
        return Image.fromarray(numbers)
    return _paint(numbers.astype(np.uint8), [COLORS[i % len(COLORS)] for i in range(255)])


def _color_indices(numbers: np.ndarray) -> np.ndarray:
    """0, or 1 to the number of colours."""
    numbers = numbers.astype(np.int32)
    return np.where(numbers > 0, 1 + (numbers - 1) % len(COLORS), 0).astype(np.uint8)


def _paint(indices: np.ndarray, colors: list) -> Image.Image:
    """Black for 0, the first of the colours for 1, and so on."""
    picture = Image.fromarray(indices)
    picture.putpalette([value for color in ((0, 0, 0), *colors) for value in color])
    return picture


def prompt_json(visit: Visit, mask: np.ndarray) -> dict[str, Any]:
    """The visit's mask and how to get it again; lists of masks are as in `everything_json`.

    `steps` are the points and boxes in order. A point is predicted together with those before it
    and, as `mask_input`, the logits of the mask shown before: `candidate` says which that was.
    """
    assert visit.answer is not None
    rle = rle_encode(mask)
    record = {
        "segmentation": rle_compress(rle),
        "area": rle_area(rle),
        "predicted_iou": float(visit.answer.scores[visit.chosen]),
    }
    height, width = visit.picture.size
    shown = [*(step.chosen for step in visit.steps[1:]), visit.chosen]
    steps = [
        {"box" if isinstance(s.prompt, Box) else "point": list(s.prompt), "candidate": chosen}
        for s, chosen in zip(visit.steps, shown, strict=True)
    ]
    prompt = prompt_of(visit)
    return {"width": width, "height": height, "prompt": prompt, "steps": steps, "masks": [record]}


def everything_json(found: Found) -> dict[str, Any]:
    """The records, in which each `segmentation` is what `pycocotools.mask` takes."""
    height, width = found.picture.size
    return {"width": width, "height": height, "masks": found.records}


def warm_up(model: Sam) -> None:
    """Compiles what images, clicks and everything mode need, so that no visitor waits for it."""
    predictor = SamPredictor(model)
    side, low = model.config.image_size, model.config.mask_size
    predictor.set_image(np.zeros((side, side, 3), np.uint8))
    picture = Picture(predictor.get_image_embedding(), (side, side))
    point, box = Step(Point(0, 0, FOREGROUND)), Step(Box(0, 0, side - 1, side - 1))
    refining = dataclasses.replace(point, refines=np.zeros((1, low, low), np.float32))
    answer(model, Visit(picture, (point,)))
    answer(model, Visit(picture, (box,)))
    # With the box's two corners, powers of two; to these other numbers are padded.
    for points in (2, 6, 14, MARKS - 1):
        answer(model, Visit(picture, (*[point] * points, box)))
        answer(model, Visit(picture, (box, *[point] * (points - 1), refining)))
    find_everything(model, picture, 1)
