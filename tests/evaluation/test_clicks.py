import numpy as np
import pytest
import scipy.ndimage
from reference import SHALLOW, meta_sam, ours

from sam_jax import SamPredictor
from sam_jax.evaluation.clicks import draw_clicks, evaluate, middle
from sam_jax.evaluation.metrics import iou
from sam_jax.ops.rle import rle_decode
from sam_jax.training.datasets import LazyMasks
from sam_jax.training.embeddings import CachedEmbeddings

H, W = 40, 60


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture(scope="module")
def model():
    return ours(meta_sam(SHALLOW), SHALLOW)


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    masks = np.array([rectangle(5, 5, 20, 30), rectangle(30, 10, 55, 25), rectangle(2, 0, 58, 33)])
    images = rng.integers(0, 255, (2, H, W, 3), dtype=np.uint8)
    return [{"image": images[0], "masks": masks}, {"image": images[1], "masks": masks[:0]}]


def test_first_click_and_box_match_the_predictor(model, dataset):
    """Computed by hand, one object after the other."""
    predictor = SamPredictor(model)
    predictor.set_image(dataset[0]["image"])
    one, box = [], []
    for mask, (x0, y0, x1, y1) in zip(
        dataset[0]["masks"], [(5, 5, 19, 29), (30, 10, 54, 24), (2, 0, 57, 32)], strict=True
    ):
        masks, scores, _ = predictor.predict([middle(mask)], [1])
        one.append(iou(masks[scores.argmax()], mask))
        masks, _, _ = predictor.predict(box=[x0, y0, x1, y1], multimask_output=False)
        box.append(iou(masks[0], mask))
    seen = []
    found = evaluate(model, dataset, objects_chunk_size=2, on_image=lambda: seen.append(1))
    assert len(seen) == 2
    assert found["objects"] == 3
    assert found["miou@1"] == pytest.approx(np.mean(one))
    assert found["miou@box"] == pytest.approx(np.mean(box))
    assert set(found) == {"miou@1", "miou@2", "miou@3", "miou@5", "miou@box", "objects"}


def plain_click(predicted, target):
    """The paper's next click, computed on the whole image: (x, y) and label."""
    depth = [
        scipy.ndimage.distance_transform_edt(np.pad(error, 1))[1:-1, 1:-1]
        for error in (target & ~predicted, predicted & ~target)
    ]
    kind, y, x = np.unravel_index(np.argmax(depth), (2, H, W))
    return (x, y), 1 - kind


@pytest.mark.slow
def test_later_clicks_match_a_plain_reference(model, dataset, monkeypatch):
    calls = []
    predict = SamPredictor.predict_batch

    def spy(self, points=None, labels=None, *, boxes=None, **options):
        result = predict(self, points, labels, boxes=boxes, **options)
        if points is not None:
            scores = result[1]
            best = result[0][np.arange(len(scores)), scores.argmax(1)]
            calls.append(([list(p) for p in points], [list(k) for k in labels], best, options))
        return result

    monkeypatch.setattr(SamPredictor, "predict_batch", spy)
    evaluate(model, dataset, clicks=(1, 3))
    assert [len(points[0]) for points, *_ in calls] == [1, 2, 3]
    assert [options["multimask_output"] for *_, options in calls] == [True, False, False]
    assert [options["mask_input"] is None for *_, options in calls] == [True, False, False]
    (_, _, predicted, _), (points, labels, _, _) = calls[:2]
    for k, mask in enumerate(dataset[0]["masks"]):
        assert (points[k][1], labels[k][1]) == plain_click(predicted[k], mask)


def test_a_thin_rim_is_not_a_large_error(model, monkeypatch):
    """The click is in a blob, even if a thin rim has more pixels, as in a plain reference."""
    target = rectangle(2, 2, 58, 38)
    rim = target & ~rectangle(4, 4, 56, 36)
    missed, extra = rectangle(10, 10, 19, 19), rectangle(30, 38, 40, 40)
    predictions = [
        target & ~rim & ~missed | rectangle(0, 0, W, 1),  # misses a rim and a blob
        rectangle(2, 2, 58, 7) | rectangle(20, 20, 35, 35),  # misses most
        target | extra,  # has an extra blob
        rectangle(8, 8, 17, 17),  # the target is the rim: misses all of it, and has an extra blob
    ]
    targets = np.array([target] * 3 + [rim])

    asked = []

    def predict_batch(self, points=None, labels=None, **_):
        """Returns the predictions, whatever the prompts are."""
        if points is not None:
            asked[:] = zip(points, labels, strict=True)
        return np.array(predictions)[:, None], np.zeros((4, 1)), np.zeros((4, 1, 1, 1))

    monkeypatch.setattr(SamPredictor, "predict_batch", predict_batch)
    evaluate(model, [{"image": np.zeros((H, W, 3), np.uint8), "masks": targets}], clicks=(2,))
    clicks = [(points[1], labels[1]) for points, labels in asked]
    expected = map(plain_click, predictions, targets)
    assert clicks == list(expected)
    assert clicks[0] == ((14, 14), 1)
    assert [label for _, label in clicks] == [1, 1, 0, 0]
    assert rim.sum() > missed.sum()


def test_cached_embeddings_change_nothing(model, dataset, tmp_path):
    cached = CachedEmbeddings(dataset, model, folder=tmp_path)
    assert evaluate(model, cached, clicks=(1,)) == evaluate(model, dataset, clicks=(1,))


def test_the_middle():
    mask = rectangle(10, 10, 21, 15) | rectangle(40, 20, 43, 23)
    assert middle(mask) == (12, 12)
    assert middle(rectangle(0, 0, W, H))[1] in (H // 2 - 1, H // 2)


def test_an_empty_mask_is_not_an_object(model, dataset):
    masks = np.insert(dataset[0]["masks"], 1, False, axis=0)
    expected = evaluate(model, dataset[:1], clicks=(2,))
    assert evaluate(model, [{**dataset[0], "masks": masks}], clicks=(2,)) == pytest.approx(expected)
    assert expected["objects"] == 3
    np.testing.assert_array_equal(
        draw_clicks(model, [{**dataset[0], "masks": masks}]), draw_clicks(model, dataset[:1])
    )


def test_nothing_to_evaluate_on(model, dataset):
    with pytest.raises(ValueError, match="there are no objects to evaluate on"):
        evaluate(model, dataset[1:])


def test_bad_masks(model, dataset):
    for masks, error, message in (
        (
            255 * dataset[0]["masks"].astype(np.uint8),
            TypeError,
            "the masks are uint8, expected bool",
        ),
        (
            dataset[0]["masks"][:, :-1],
            ValueError,
            r"masks have shape \(3, .*, expected masks of",
        ),
    ):
        for function in (evaluate, draw_clicks):
            with pytest.raises(error, match=message):
                function(model, [{**dataset[0], "masks": masks}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clicks": ()}, r"clicks is \(\), expected one number of clicks or more"),
        ({"clicks": 3}, "clicks is 3, expected one number of clicks or more"),
        ({"clicks": (0, 2)}, "clicks is 0, expected a whole number of at least 1"),
        ({"clicks": (1.5, 2)}, r"clicks is 1\.5, expected a whole number of at least 1"),
        ({"objects_chunk_size": 0}, "objects_chunk_size is 0, expected a whole number of at lea"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options(model, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, dataset, **options)


@pytest.mark.usefixtures("unchecked")
def test_nothing_to_draw(model, dataset):
    with pytest.raises(ValueError, match="count is 0, expected a whole number of at least 1"):
        draw_clicks(model, dataset, count=0)
    with pytest.raises(ValueError, match="there are no images to draw"):
        draw_clicks(model, [])


def test_images_of_clicks(model, dataset):
    sheet = np.asarray(draw_clicks(model, dataset))
    assert sheet.shape == (H, 2 * W, 3)
    assert not np.array_equal(sheet[:, :W], dataset[0]["image"])
    np.testing.assert_array_equal(sheet[:, W:], dataset[1]["image"])  # has no object


def test_only_some_of_many_objects_are_drawn(model, dataset, monkeypatch):
    """The others are neither decoded nor predicted."""
    decoded, asked = [], []

    def predict(self, points, labels):
        asked.append(len(points))
        return np.zeros((len(points), 3, H, W), bool), np.zeros((len(points), 3)), None

    spy = lambda rle: decoded.append(rle) or rle_decode(rle)  # noqa: E731
    monkeypatch.setattr("sam_jax.training.datasets.rle_decode", spy)
    monkeypatch.setattr(SamPredictor, "predict_batch", predict)
    masks = LazyMasks([{"size": [H, W], "counts": [0, H * W]}] * 20, (H, W))
    draw_clicks(model, [{**dataset[0], "masks": masks}])
    assert asked == [16]
    assert len(decoded) == 16
