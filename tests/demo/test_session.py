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
from reference import SHALLOW, meta_sam, ours

from sam_jax import SamAutomaticMaskGenerator, SamPredictor
from sam_jax.demo import session as demo
from sam_jax.demo.app import Demo
from sam_jax.demo.limits import Limits
from sam_jax.demo.session import Box, EmbeddedImage, Found, Point, Session, Step
from sam_jax.visualize import COLORS

pytestmark = pytest.mark.slow

SIZE = (71, 113)


@pytest.fixture(scope="module")
def model():
    return ours(meta_sam(SHALLOW), SHALLOW)


@pytest.fixture(scope="module")
def image():
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def embedded(model, image):
    return demo.open_image_file(SamPredictor(model), file(image))[0]


def file(image, kind="png", **options):
    """Encodes an image as a file."""
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


@pytest.fixture(scope="module")
def predictor(model, image):
    predictor = SamPredictor(model)
    predictor.set_image(image)
    return predictor


def test_prompts_come_and_go():
    nothing = Session(EmbeddedImage(np.zeros(0), (100, 200)))
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


def test_prompts_stay_in_the_image():
    nothing = Session(EmbeddedImage(np.zeros(0), (100, 200)))
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
def test_masks_match_the_predictor(model, embedded, predictor, prompts):
    """At the image's own size, although masks are first computed at the model's."""
    session = demo.predict(model, Session(embedded, tuple(map(Step, prompts))))
    masks, scores, logits = predictor.predict(**demo.prompt_of(session))
    order = np.argsort(-scores)
    assert len(scores) == (3 if len(prompts) == 1 and isinstance(prompts[0], Point) else 1)
    assert np.array_equal(session.prediction.scores, scores[order])
    assert np.array_equal(session.prediction.logits, logits[order])
    assert session.prediction.masks.shape == (len(scores), 60, 96)
    for i in range(len(scores)):
        assert np.array_equal(demo.full_mask(model, demo.choose(session, i)), masks[order[i]])
    assert demo.choose(session, len(scores)).chosen == 0


def test_points_refine_the_mask_that_is_shown(model, embedded, predictor):
    """As on Meta's page. A box starts again, and undo restores the previous mask."""
    sessions = [demo.choose(demo.predict(model, demo.add_point(Session(embedded), 50, 30, 1)), 2)]
    for add in (
        lambda session: demo.add_point(session, 9, 60, 0),
        lambda session: demo.add_point(session, 30, 20, 1),
        lambda session: demo.add_box(session, *BOX),
        lambda session: demo.add_point(session, 70, 20, 1),
    ):
        sessions.append(demo.predict(model, add(sessions[-1])))
    before = None
    for i, session in enumerate(sessions):
        _, scores, logits = predictor.predict(**demo.prompt_of(session), mask_input=before)
        order = np.argsort(-scores)
        assert np.array_equal(session.prediction.logits, logits[order])
        before = None if i == 2 else logits[order][session.chosen][None]
        assert before is None or before.shape == LOW
    without = predictor.predict(**demo.prompt_of(sessions[2]))[2]
    assert not np.allclose(sessions[2].prediction.logits, without)
    for session, after in itertools.pairwise(sessions):
        undone = demo.predict(model, demo.undo(after))
        assert undone.chosen == session.chosen
        assert np.array_equal(undone.prediction.logits, session.prediction.logits)


def test_no_prompts_no_answer(model, embedded):
    session = demo.predict(model, demo.add_point(Session(embedded), 50, 30, 1))
    session = demo.predict(model, demo.undo(demo.choose(session, 2)))
    assert session.prediction is None
    assert session.chosen == demo.choose(session, 5).chosen == 0


def test_mask_as_json(model, embedded):
    session = demo.predict(model, demo.add_point(Session(embedded), 50, 30, 1))
    session = demo.predict(model, demo.add_box(demo.choose(session, 1), *BOX))
    mask = demo.full_mask(model, session)
    result = json.loads(json.dumps(demo.prompt_json(session, mask)))
    assert (result["height"], result["width"]) == SIZE
    assert result["prompt"] == demo.prompt_of(session)
    assert result["steps"] == [
        {"point": [50, 30, 1], "candidate": 1},
        {"box": [10, 5, 90, 60], "candidate": 0},
    ]
    (record,) = result["masks"]
    assert np.array_equal(pycocotools.mask.decode(record["segmentation"]), mask)
    assert record["area"] == mask.sum()
    assert record["predicted_iou"] == pytest.approx(session.prediction.scores[0])


def test_everything(model, embedded, image, monkeypatch):
    # With the default thresholds, no mask of random weights would pass.
    monkeypatch.setattr(
        demo,
        "SamAutomaticMaskGenerator",
        lambda *args, **options: SamAutomaticMaskGenerator(
            *args, **options, pred_iou_thresh=0, stability_score_thresh=0
        ),
    )
    progress = []
    found = demo.find_everything(model, embedded, 9, lambda *step: progress.append(step))
    # 81 points, 8 at a time, then the masks.
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


def test_numbering_masks_uses_only_their_runs():
    """Masks are not decoded at the image's size: hundreds of large ones would take a minute."""
    size, expected, records = (1000, 1200), np.zeros((1000, 1200), np.uint16), []
    for i in range(20):
        mask = np.zeros(size, bool)
        mask[40 * i : 40 * i + 90, 50 * i : 50 * i + 150 - i] = True
        expected[mask] = i + 1
        rle = demo.rle_compress(demo.rle_encode(mask))
        records.append({"segmentation": rle, "area": int(mask.sum())})
    found = Found(EmbeddedImage(np.zeros(0), size), records)
    tracemalloc.start()
    numbers = demo.number_masks(found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(numbers, expected)
    assert peak < 1.2 * numbers.nbytes


def test_numbers_as_an_image():
    numbers = np.arange(12, dtype=np.uint16).reshape(3, 4)
    image = demo.label_image(numbers)
    assert np.array_equal(np.asarray(image), numbers)
    colors = np.asarray(image.convert("RGB"))
    assert colors[0, 0].tolist() == [0, 0, 0]
    assert colors[0, 1].tolist() == colors[2, 0].tolist() == list(COLORS[0])
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 8
    many = demo.label_image(numbers * 100)
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
def test_any_kind_of_image(model, image, mode):
    embedded, shown = demo.open_image_file(SamPredictor(model), file(image.convert(mode), "tiff"))
    assert embedded.size == SIZE
    assert embedded.embedding.shape == (1, 32, 12, 12)
    assert (shown.mode, shown.size) == ("RGB", SIZE[::-1])


def test_animation_gives_its_first_frame(model, image):
    frames = [image.convert("P"), Image.new("P", image.size)]
    _, shown = demo.open_image_file(
        SamPredictor(model), file(frames[0], "gif", save_all=True, append_images=frames[1:])
    )
    assert np.array_equal(np.asarray(shown), np.asarray(frames[0].convert("RGB")))


def test_rotated_and_large(model, monkeypatch):
    monkeypatch.setattr(demo, "SHOWN", 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    photo = file(Image.new("RGB", (120, 80)), "jpeg", exif=exif)
    embedded, shown = demo.open_image_file(SamPredictor(model), photo)
    assert embedded.size == (120, 80)
    assert shown.size == (40, 60)


@pytest.mark.parametrize("pixels", [101, 100 * Image.MAX_IMAGE_PIXELS], ids=["more", "a_bomb"])
def test_too_large(model, monkeypatch, pixels):
    """The file's header shows it, before any pixels are read."""
    monkeypatch.setattr(demo, "PIXELS", 100)
    photo = file(Image.new("L", (101, 1)))
    if pixels > 101:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    monkeypatch.setattr(demo, "load_image", None)
    with pytest.raises(ValueError, match=r"has 101 x 1 pixels, expected at most|exceeds limit of"):
        demo.open_image_file(SamPredictor(model), photo)


def test_number_of_scans_is_limited(model, monkeypatch):
    """Each scan decodes all pixels. Similar bytes in a segment or after the end do not count."""
    noise, like_one = Image.effect_noise((64, 64), 50), b"\xff\xda" * 99
    photo = file(noise, "jpeg", progressive=True, comment=like_one)
    last = photo[photo.rindex(b"\xff\xda") : -2]
    assert demo.open_image_file(SamPredictor(model), photo + like_one)[0].size == (64, 64)
    monkeypatch.setattr(demo, "load_image", None)
    with pytest.raises(ValueError, match=r"the JPEG has \d\d scans, expected at most 50; save"):
        demo.open_image_file(SamPredictor(model), photo[:-2] + last * 50 + photo[-2:])


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
def test_size_of_tiles_is_limited(model, monkeypatch, sides, kind):
    """Tiles are decoded whole, however small the image is, and decoders read tags differently."""
    data = zlib.compress(bytes(64 * 64))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 324: 1000, 325: len(data)}
    entries = [(tag, 4, 1, value) for tag, value in tags.items()]
    entries += [(tag, kind, 1, side) for tag in (322, 323) for side in sides]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries, key=lambda e: e[0]))
    photo = head.ljust(1000, b"\0") + data
    if (sides, kind) == ((64,), LONG):
        assert demo.open_image_file(SamPredictor(model), photo)[0].size == (64, 64)
        return
    monkeypatch.setattr(demo, "load_image", None)
    with pytest.raises(ValueError, match="the TIFF has tiles of more than 50 million pixels, or"):
        demo.open_image_file(SamPredictor(model), photo)


def test_no_image(model):
    # The content counts, not the name: some of Pillow's formats start other programs, or hold more
    # pixels than they declare.
    for photo in (b"no image", file(Image.new("RGB", (9, 9)), "EPS")):
        with pytest.raises(ValueError, match="the file is not an image of a known format"):
            demo.open_image_file(SamPredictor(model), photo)
    with pytest.raises(ValueError, match="the file's format is ICO, expected AVIF, BMP, GIF, JPEG"):
        demo.open_image_file(SamPredictor(model), file(Image.new("RGB", (32, 32)), "ICO"))
    with pytest.raises(ValueError, match="the file cannot be read"):
        demo.open_image_file(SamPredictor(model), file(Image.effect_noise((64, 64), 50))[:2000])
    with pytest.raises(TypeError, match="more than 8 bits per channel"):
        demo.open_image_file(SamPredictor(model), file(Image.new("I;16", (9, 9))))


def test_nothing_found(embedded):
    assert demo.number_masks(Found(embedded, [])).shape == SIZE
    assert not demo.number_masks(Found(embedded, [])).any()


def test_warm_up_compiles_what_clicks_need(model, image, compilations):
    app = Demo(SamPredictor(model), set(), Limits())
    for work in app.warm_up():
        work.result()
    app.close()
    photo = file(image.resize((80, 90)))
    compilations.clear()
    session = Session(demo.open_image_file(SamPredictor(model), photo)[0])
    for x in range(demo.MARKS):
        session = demo.predict(model, demo.add_point(session, x, 9, x % 2))
    for points in (0, 1, 5, 20):
        session = Session(session.image, session.steps[:points])
        session = demo.predict(model, demo.add_box(session, 1, 1, 50, 50))
        session = demo.predict(model, demo.add_point(session, 1, 1, 1))
    demo.find_everything(model, session.image, 5)
    assert not compilations


def test_number_of_marks_is_limited(embedded):
    session = demo.add_box(Session(embedded), 1, 1, 5, 5)
    for _ in range(demo.MARKS - 1):
        session = demo.add_point(session, 1, 1, 1)
    for add in (
        lambda: demo.add_point(session, 1, 1, 1),
        lambda: demo.add_box(session, 1, 1, 2, 2),
    ):
        with pytest.raises(ValueError, match="there are already 31 points and boxes, the maximum"):
            add()
