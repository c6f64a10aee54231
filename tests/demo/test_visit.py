import io
import itertools
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image
from reference import SMALL, meta_sam, ours

from sam_jax import SamAutomaticMaskGenerator, SamPredictor
from sam_jax.demo import visit as demo
from sam_jax.demo.visit import Box, Found, Picture, Point, Step, Visit
from sam_jax.visualize import COLORS

SIZE = (71, 113)


@pytest.fixture(scope="module")
def model():
    return ours(meta_sam(SMALL), SMALL)


@pytest.fixture(scope="module")
def image():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def picture(model, image):
    return demo.open_picture(model, file(image))[0]


def file(image, kind="png", **options):
    """An image's file."""
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


@pytest.fixture(scope="module")
def predictor(model, image):
    predictor = SamPredictor(model)
    predictor.set_image(image)
    return predictor


def test_prompts_come_and_go():
    nothing = Visit(Picture(np.zeros(0), (100, 200)))
    one = demo.add_point(nothing, 12.7, 30, 1)
    boxed = demo.add_box(one, 150, 80, 20, 10)
    two = demo.add_point(boxed, 5, 6, 0)
    again = demo.add_box(two, 0, 0, 9, 9)
    assert again.points == [Point(12, 30, 1), Point(5, 6, 0)]
    assert again.box == Box(0, 0, 9, 9)
    assert demo.undo(again) == two
    assert demo.undo(again).box == Box(20, 10, 150, 80)
    assert demo.undo(demo.undo(demo.undo(again))) == one
    assert demo.undo(nothing) == demo.clear(again) == nothing
    assert demo.prompt_of(two) == {
        "point_coords": [[12, 30], [5, 6]],
        "point_labels": [1, 0],
        "box": [20, 10, 150, 80],
        "multimask_output": False,
    }
    assert demo.prompt_of(one)["multimask_output"] is True
    assert demo.prompt_of(demo.add_point(one, 1, 1, 1))["multimask_output"] is False


def test_prompts_stay_in_the_picture():
    nothing = Visit(Picture(np.zeros(0), (100, 200)))
    assert demo.add_point(nothing, -5, 1e9, 1).points == [Point(0, 99, 1)]
    assert demo.add_box(nothing, 300, -1, -3, 50.5).box == Box(0, 0, 199, 50)
    with pytest.raises(ValueError, match="a coordinate is nan, expected a finite number"):
        demo.add_point(nothing, float("nan"), 1, 1)


BOX, LOW = Box(10, 5, 90, 60), (1, 48, 48)


@pytest.mark.parametrize(
    "prompts",
    [
        (Point(50, 30, 1),),
        (Point(50, 30, 1), Point(9, 60, 0)),
        (BOX,),
        (Box(0, 0, 1, 1), Point(40, 40, 1), BOX),
    ],
    ids=["point", "points", "box", "box_and_point"],
)
def test_masks_are_the_predictors(model, picture, predictor, prompts):
    """At the picture's own size, though what is computed first has the model's."""
    visit = demo.answer(model, Visit(picture, tuple(map(Step, prompts))))
    masks, scores, logits = predictor.predict(**demo.prompt_of(visit))
    order = np.argsort(-scores)
    assert len(scores) == (3 if len(prompts) == 1 and isinstance(prompts[0], Point) else 1)
    assert np.array_equal(visit.answer.scores, scores[order])
    assert np.array_equal(visit.answer.logits, logits[order])
    assert visit.answer.masks.shape == (len(scores), 60, 96)
    for i in range(len(scores)):
        assert np.array_equal(demo.full_mask(model, demo.choose(visit, i)), masks[order[i]])
    assert demo.choose(visit, len(scores)).chosen == 0


def test_points_refine_the_mask_that_is_shown(model, picture, predictor):
    """As Meta's page does; a box begins anew, and undoing brings back what was shown."""
    visits = [demo.choose(demo.answer(model, demo.add_point(Visit(picture), 50, 30, 1)), 2)]
    for add in (
        lambda visit: demo.add_point(visit, 9, 60, 0),
        lambda visit: demo.add_point(visit, 30, 20, 1),
        lambda visit: demo.add_box(visit, *BOX),
        lambda visit: demo.add_point(visit, 70, 20, 1),
    ):
        visits.append(demo.answer(model, add(visits[-1])))
    before = None
    for i, visit in enumerate(visits):
        _, scores, logits = predictor.predict(**demo.prompt_of(visit), mask_input=before)
        order = np.argsort(-scores)
        assert np.array_equal(visit.answer.logits, logits[order])
        before = None if i == 2 else logits[order][visit.chosen][None]
        assert before is None or before.shape == LOW
    without = predictor.predict(**demo.prompt_of(visits[2]))[2]
    assert not np.allclose(visits[2].answer.logits, without)
    for visit, after in itertools.pairwise(visits):
        undone = demo.answer(model, demo.undo(after))
        assert undone.chosen == visit.chosen
        assert np.array_equal(undone.answer.logits, visit.answer.logits)


def test_no_prompts_no_answer(model, picture):
    visit = demo.answer(model, demo.add_point(Visit(picture), 50, 30, 1))
    visit = demo.answer(model, demo.undo(demo.choose(visit, 2)))
    assert visit.answer is None
    assert visit.chosen == demo.choose(visit, 5).chosen == 0


def test_mask_as_json(model, picture):
    visit = demo.answer(model, demo.add_point(Visit(picture), 50, 30, 1))
    visit = demo.answer(model, demo.add_box(demo.choose(visit, 1), *BOX))
    mask = demo.full_mask(model, visit)
    result = json.loads(json.dumps(demo.prompt_json(visit, mask)))
    assert (result["height"], result["width"]) == SIZE
    assert result["prompt"] == demo.prompt_of(visit)
    assert result["steps"] == [
        {"point": [50, 30, 1], "candidate": 1},
        {"box": [10, 5, 90, 60], "candidate": 0},
    ]
    (record,) = result["masks"]
    assert np.array_equal(pycocotools.mask.decode(record["segmentation"]), mask)
    assert record["area"] == mask.sum()
    assert record["predicted_iou"] == pytest.approx(visit.answer.scores[0])


def test_everything(model, picture, image, monkeypatch):
    # Of random weights no mask would pass.
    monkeypatch.setattr(
        demo,
        "SamAutomaticMaskGenerator",
        lambda *args, **options: SamAutomaticMaskGenerator(
            *args, **options, pred_iou_thresh=0, stability_score_thresh=0
        ),
    )
    progress = []
    found = demo.find_everything(model, picture, 9, lambda *step: progress.append(step))
    # 81 points, 8 at a time; then the masks.
    assert progress[:11] == [(i + 1, 11) for i in range(11)]
    assert set(progress[11:]) == {(11, 11)}
    generator = SamAutomaticMaskGenerator(
        model, 9, pred_iou_thresh=0, stability_score_thresh=0, output_mode="coco_rle"
    )
    expected = generator.generate(image)
    assert len(expected) > 3
    result = json.loads(json.dumps(demo.everything_json(found)))
    assert result == {"width": SIZE[1], "height": SIZE[0], "masks": expected}

    numbers = demo.number_masks(found)
    masks = np.array([pycocotools.mask.decode(r["segmentation"]) for r in expected], bool)
    areas = np.where(masks, masks.sum((1, 2), keepdims=True), 2**30)
    assert np.array_equal(numbers > 0, masks.any(0))
    (ys, xs) = np.nonzero(numbers)
    assert np.array_equal(areas[numbers[ys, xs] - 1, ys, xs], areas.min(0)[ys, xs])


def test_numbering_masks_takes_their_runs_only():
    """No mask is decoded at the picture's size: hundreds of a large one would take a minute."""
    size, expected, records = (1000, 1200), np.zeros((1000, 1200), np.uint16), []
    for i in range(20):
        mask = np.zeros(size, bool)
        mask[40 * i : 40 * i + 90, 50 * i : 50 * i + 150 - i] = True
        expected[mask] = i + 1
        rle = demo.rle_compress(demo.rle_encode(mask))
        records.append({"segmentation": rle, "area": int(mask.sum())})
    found = Found(Picture(np.zeros(0), size), records)
    tracemalloc.start()
    numbers = demo.number_masks(found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(numbers, expected)
    assert peak < 1.2 * numbers.nbytes


def test_numbers_as_a_picture():
    numbers = np.arange(12, dtype=np.uint16).reshape(3, 4)
    picture = demo.label_picture(numbers)
    assert np.array_equal(np.asarray(picture), numbers)
    colors = np.asarray(picture.convert("RGB"))
    assert colors[0, 0].tolist() == [0, 0, 0]
    assert colors[0, 1].tolist() == colors[2, 0].tolist() == list(COLORS[0])
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 8
    many = demo.label_picture(numbers * 100)
    assert many.mode == "I;16"
    assert np.array_equal(np.asarray(many), numbers * 100)


def test_layer_is_tinted_outlined_and_transparent():
    numbers = np.zeros((20, 30), np.uint16)
    numbers[2:9, 3:20] = 1
    numbers[11:18, 3:20] = 9
    layer = np.asarray(demo.draw_layer(numbers).convert("RGBA"))
    assert layer.shape == (20, 30, 4)
    assert (layer[numbers == 0, 3] == 0).all()
    assert layer[5, 10].tolist() == [*COLORS[0], 140]
    assert layer[14, 10].tolist() == [*COLORS[1], 140]
    for y, x in ((2, 10), (8, 3), (11, 19)):
        assert layer[y, x].tolist() == [255] * 4


def test_a_large_layer_is_made_smaller():
    numbers = np.zeros((4, 4000), bool)
    numbers[:, 1000:] = True
    layer = np.asarray(demo.draw_layer(numbers).convert("RGBA"))
    assert layer.shape == (2, demo.SHOWN, 4)
    assert (layer[:, 400:, 3] > 0).all()
    assert (layer[:, :400, 3] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK", "P", "1"])
def test_any_kind_of_picture(model, image, mode):
    picture, shown = demo.open_picture(model, file(image.convert(mode), "tiff"))
    assert picture.size == SIZE
    assert picture.embedding.shape == (1, 32, 12, 12)
    assert (shown.mode, shown.size) == ("RGB", SIZE[::-1])


def test_animation_gives_its_first_frame(model, image):
    frames = [image.convert("P"), Image.new("P", image.size)]
    _, shown = demo.open_picture(
        model, file(frames[0], "gif", save_all=True, append_images=frames[1:])
    )
    assert np.array_equal(np.asarray(shown), np.asarray(frames[0].convert("RGB")))


def test_rotated_and_large(model, monkeypatch):
    monkeypatch.setattr(demo, "SHOWN", 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    photo = file(Image.new("RGB", (120, 80)), "jpeg", exif=exif)
    picture, shown = demo.open_picture(model, photo)
    assert picture.size == (120, 80)
    assert shown.size == (40, 60)


@pytest.mark.parametrize("pixels", [101, 100 * Image.MAX_IMAGE_PIXELS], ids=["more", "a_bomb"])
def test_too_large(model, monkeypatch, pixels):
    """Told from the file's head, before its pixels are read."""
    monkeypatch.setattr(demo, "PIXELS", 100)
    photo = file(Image.new("L", (101, 1)))
    if pixels > 101:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    monkeypatch.setattr(demo, "load_image", None)
    with pytest.raises(ValueError, match=r"has 101 x 1 pixels, expected at most|exceeds limit of"):
        demo.open_picture(model, photo)


def test_scans_are_few(model, monkeypatch):
    """Each goes through all pixels; what only looks like one is within a segment, or after all."""
    noise, like_one = Image.effect_noise((64, 64), 50), b"\xff\xda" * 99
    photo = file(noise, "jpeg", progressive=True, comment=like_one)
    last = photo[photo.rindex(b"\xff\xda") : -2]
    assert demo.open_picture(model, photo + like_one)[0].size == (64, 64)
    monkeypatch.setattr(demo, "load_image", None)
    with pytest.raises(ValueError, match=r"the JPEG has \d\d scans, expected at most 50; save"):
        demo.open_picture(model, photo[:-2] + last * 50 + photo[-2:])


LONG, SLONG8 = 4, 17


@pytest.mark.parametrize(
    ("sides", "kind"),
    [
        ((64,), LONG),
        ((20_000,), LONG),
        ((20_000, 64), LONG),
        ((64, 20_000), LONG),
        ((64,), SLONG8),
    ],
)
def test_tiles_are_small(model, monkeypatch, sides, kind):
    """They are decoded whole, however small the image is; and not all decoders read tags alike."""
    data = zlib.compress(bytes(64 * 64))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 324: 1000, 325: len(data)}
    entries = [(tag, 4, 1, value) for tag, value in tags.items()]
    entries += [(tag, kind, 1, side) for tag in (322, 323) for side in sides]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries, key=lambda e: e[0]))
    photo = head.ljust(1000, b"\0") + data
    if (sides, kind) == ((64,), LONG):
        assert demo.open_picture(model, photo)[0].size == (64, 64)
        return
    monkeypatch.setattr(demo, "load_image", None)
    with pytest.raises(ValueError, match="the TIFF has tiles of more than 50 million pixels, or"):
        demo.open_picture(model, photo)


def test_no_picture(model):
    # Whose content counts, not their names: some of Pillow's formats start other programs, or hold
    # more pixels than they say.
    for photo in (b"no image", file(Image.new("RGB", (9, 9)), "EPS")):
        with pytest.raises(ValueError, match="the file is not an image of a known format"):
            demo.open_picture(model, photo)
    with pytest.raises(ValueError, match="the file is a ICO, expected AVIF, BMP, GIF, JPEG"):
        demo.open_picture(model, file(Image.new("RGB", (32, 32)), "ICO"))
    with pytest.raises(ValueError, match="the file cannot be read"):
        demo.open_picture(model, file(Image.effect_noise((64, 64), 50))[:2000])
    with pytest.raises(TypeError, match="more than 8 bits per channel"):
        demo.open_picture(model, file(Image.new("I;16", (9, 9))))


def test_nothing_found(picture):
    assert demo.number_masks(Found(picture, [])).shape == SIZE
    assert not demo.number_masks(Found(picture, [])).any()


def test_warm_up_compiles_what_clicks_need(model, image, compilations):
    demo.warm_up(model)
    photo = file(image.resize((80, 90)))
    compilations.clear()
    visit = Visit(demo.open_picture(model, photo)[0])
    for x in range(demo.MARKS):
        visit = demo.answer(model, demo.add_point(visit, x, 9, x % 2))
    for points in (0, 1, 5, 20):
        visit = Visit(visit.picture, visit.steps[:points])
        visit = demo.answer(model, demo.add_box(visit, 1, 1, 50, 50))
        visit = demo.answer(model, demo.add_point(visit, 1, 1, 1))
    demo.find_everything(model, visit.picture, 5)
    assert not compilations


def test_marks_are_as_many_as_are_compiled_for(picture):
    visit = demo.add_box(Visit(picture), 1, 1, 5, 5)
    for _ in range(demo.MARKS - 1):
        visit = demo.add_point(visit, 1, 1, 1)
    for add in (lambda: demo.add_point(visit, 1, 1, 1), lambda: demo.add_box(visit, 1, 1, 2, 2)):
        with pytest.raises(ValueError, match="there are 31 points and boxes, the most there can"):
            add()
