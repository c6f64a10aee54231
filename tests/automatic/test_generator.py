import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import skimage.data
import torch
import torch_reference
from everything import (
    ALL,
    GRID,
    assert_same_records,
    found_in_an_image,
    generator,
    random_image,
    segmentation,
    small,
)
from flax import nnx
from PIL import Image
from reference import SHALLOW, mask_iou, mobile_sam_torch, ours

from sam_jax import SamPredictor, from_pretrained
from sam_jax.automatic import generator as module
from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.config import with_preprocessing

amg = torch_reference.import_reference("segment_anything")


class Remembered(torch.nn.Module):
    """Caches the embeddings of an image encoder: PyTorch takes seconds for each."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.img_size, self.found = encoder, encoder.img_size, {}

    def forward(self, pixels):
        key = pixels.numpy().tobytes()
        if key not in self.found:
            self.found[key] = self.encoder(pixels)
        return self.found[key]


@pytest.fixture(scope="module")
def mobile(mobile_sam_file):
    torch_sam = mobile_sam_torch(mobile_sam_file)
    torch_sam.image_encoder = Remembered(torch_sam.image_encoder)
    return torch_sam, from_pretrained(mobile_sam_file)


def photo(name):
    coffee = skimage.data.coffee()  # 600 x 400
    return {
        "landscape": coffee,
        "portrait": np.ascontiguousarray(skimage.data.astronaut()[:, 100:400]),
        "small": np.asarray(Image.fromarray(skimage.data.chelsea()).resize((150, 100))),
        "large": np.asarray(Image.fromarray(skimage.data.rocket()).resize((1601, 1068))),
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("landscape", {}),
        ("landscape", {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}),
        ("portrait", {"points_per_side": None, "point_grids": [GRID]}),
        (
            "large",
            {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.5, "min_mask_region_area": 200},
        ),
        ("small", {"points_per_side": 5, "output_mode": "coco_rle"}),
    ],
    ids=str,
)
def test_records_match_meta(mobile, name, options):
    options = {"points_per_side": 4, **options}
    torch_sam, model = mobile
    expected = amg.SamAutomaticMaskGenerator(torch_sam, **options).generate(photo(name))
    actual = SamAutomaticMaskGenerator(model, **options).generate(photo(name))
    assert len(actual) >= 3
    assert_same_records(actual, expected)


FURTHER_OPTIONS = (
    {},
    {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_overlap_ratio": 0.1},
    {"box_nms_thresh": 0.5, "output_mode": "uncompressed_rle"},
    {"stability_score_thresh": 0.2, "stability_score_offset": 0.05},
    {"min_mask_region_area": 40},
    {"points_per_side": None, "point_grids": [GRID, GRID[:5]], "crop_n_layers": 1},
)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_n_layers": 1, "crop_nms_thresh": 0.99},
        *(pytest.param(options, marks=pytest.mark.slow) for options in FURTHER_OPTIONS),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_options_match_meta(options):
    torch_sam, model = small()
    options = {**ALL, "points_per_side": 6, **options}
    image = random_image(120, 160)
    expected = amg.SamAutomaticMaskGenerator(torch_sam, **options).generate(image)
    actual = SamAutomaticMaskGenerator(model, **options).generate(image)
    assert actual
    assert_same_records(actual, expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a["bbox"], a["area"]) == (e["bbox"], e["area"])
        assert type(a["segmentation"]) is type(e["segmentation"])


@pytest.mark.slow
def test_a_stretched_image():
    """With MedSAM's preprocessing, the masks match the predictor's, also in crops."""
    model = ours(small()[0], with_preprocessing(SHALLOW, "medsam"))
    image, predictor = random_image(70, 110), SamPredictor(model)
    grids = [np.array([[0.3, 0.6]]), np.array([[0.5, 0.5]])]
    generator = SamAutomaticMaskGenerator(
        model, None, point_grids=grids, crop_n_layers=1, crop_nms_thresh=1, **ALL
    )
    records = generator.generate(image)
    crops = {tuple(record["crop_box"]) for record in records}
    assert len(crops) > 1
    for x, y, w, h in crops:
        predictor.set_image(image[y : y + h, x : x + w])
        found = [r for r in records if r["crop_box"] == [x, y, w, h]]
        point = np.array(found[0]["point_coords"]) - [x, y]
        masks, scores, _ = predictor.predict(point, [1])
        for record in found:
            k = np.abs(scores - record["predicted_iou"]).argmin()
            mask = segmentation(record)
            assert mask_iou(mask[y : y + h, x : x + w], masks[k]) >= 0.999
            assert mask.sum() == record["area"]


@pytest.mark.slow
def test_a_batch_matches_single_images():
    images = [random_image(50, 200, 1), random_image(130, 90, 2), random_image(96, 96, 3)]
    some = generator(crop_n_layers=1)
    for actual, image in zip(some.generate_batch(images), images, strict=True):
        assert_same_records(actual, some.generate(image), exact=True)
    assert list(some.generate_batch([])) == []


def test_batches_are_read_and_yielded_one_by_one():
    taken = []

    def images():
        for i in range(6):
            taken.append(i)
            yield random_image(40, 50, i)

    some = generator()
    for i, records in enumerate(some.generate_batch(images())):
        assert_same_records(records, some.generate(random_image(40, 50, i)), exact=True)
        # One image is being processed, and one is read ahead.
        assert len(taken) <= i + 3
    assert taken == [*range(6)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(0, "found found given found given given"), (1, "found given found given found given")],
)
def test_the_callback_comes_before_the_records(layers, expected):
    """Once per image, with or without crops: progress shows while the next image is processed."""
    events = []
    images = (random_image(40, 50, i) for i in range(3))
    some = generator(crop_n_layers=layers, points_per_side=2)
    for _ in some.generate_batch(images, lambda: events.append("found")):
        events.append("given")
    assert " ".join(events) == expected


def test_an_error_comes_after_the_images_before_it():
    images = [random_image(40, 50, i) for i in range(3)]
    batch = generator().generate_batch([*images, np.zeros((0, 3, 3), np.uint8), images[0]])
    for image in images:
        assert_same_records(next(batch), generator().generate(image), exact=True)
    with pytest.raises(ValueError, match="the image is empty"):
        next(batch)


def test_a_batch_can_be_closed_early():
    batch = generator().generate_batch(random_image(40, 50) for _ in range(10**9))
    assert next(batch)
    batch.close()


def printed(program, **environment):
    """The output of a separate process with other JAX settings."""
    environment |= {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command, environment = [sys.executable, "-c", program], {**os.environ, **environment}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


DEVICES = """
import sys
import jax, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import everything as tests

images = [tests.random_image(60 + 10 * i, 120 - 7 * i, i) for i in range(6)]
one = tests.generator(crop_n_layers=1)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
eight = tests.generator(crop_n_layers=1, mesh=mesh)
assert len(jax.devices()) == 8
for actual, image in zip(eight.generate_batch(images), images, strict=True):
    tests.assert_same_records(actual, one.generate(image), exact=True)

# Images whose points are skipped are done after fewer batches.
coarse = {"hierarchical": True, "box_nms_thresh": 0.5, "points_per_batch": 4}
one, eight = tests.generator(**coarse), tests.generator(**coarse, mesh=mesh)
for actual, image in zip(eight.generate_batch(images), images, strict=True):
    tests.assert_same_records(actual, one.generate(image), exact=True)

# A predictor takes one device of a model that is spread over a mesh.
everywhere = jax.device_put(tests.small()[1], NamedSharding(mesh, PartitionSpec()))
predictor, expected = tests.SamPredictor(everywhere), tests.SamPredictor(tests.small()[1])
found = []
for some in (predictor, expected):
    some.set_image(images[0])
    found.append(some.predict([[5, 5]], [1]).logits)
np.testing.assert_array_equal(*found)

# A model on another device than the first does all its work there.
there = jax.devices()[3]
graphdef, params = nnx.split(tests.small()[1])
model = nnx.merge(graphdef, jax.device_put(params, there))
outputs = model(np.zeros((1, 96, 96, 3), np.float32), np.zeros((1, 3, 1, 2), np.float32))
assert outputs.pred_masks.devices() == outputs.iou_scores.devices() == {there}
put, devices = jax.device_put, set()
def watched(*arguments, **options):
    arrays = put(*arguments, **options)
    devices.update(*(array.devices() for array in jax.tree.leaves(arrays)))
    return arrays
jax.device_put = watched
predictor = tests.SamPredictor(model)
with jax.transfer_guard_device_to_device("disallow_explicit"):
    predictor.set_image(images[0])
    predictor.predict([[5, 5]], [1])
    predictor.set_image_embedding(predictor.get_image_embedding(), predictor.original_size)
    predictor.predict([[5, 5]], [1])
assert devices == {there}
print("same")
"""


@pytest.mark.slow
def test_eight_devices_match_one():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    assert printed(DEVICES, XLA_FLAGS=flags, JAX_PLATFORMS="cpu") == "same\n"


X64 = """
import json
import jax
from flax import nnx
import everything as tests
from reference import SHALLOW, SMALL_TINY
from sam_jax import Sam
from sam_jax.checkpoints.params import flat_params
from sam_jax.training.lora import add_lora

model = Sam(SHALLOW, rngs=nnx.Rngs(0))
tiny = nnx.eval_shape(lambda: Sam(SMALL_TINY, rngs=nnx.Rngs(0)))
adapted = add_lora(model, ".*qkv", rank=2, rngs=nnx.Rngs(0))
new = {str(a.dtype) for m in (model, tiny, adapted) for a in jax.tree.leaves(nnx.split(m)[1])}
print(json.dumps([jax.config.jax_enable_x64, sorted(new), tests.found_in_an_image()]))
"""


@pytest.mark.slow
def test_64_bits_change_nothing():
    enabled, new, (dtypes, scores, records) = json.loads(printed(X64, JAX_ENABLE_X64="1"))
    assert enabled
    assert new == ["float32", "int32"]  # the latter counts a batch norm's batches
    expected_dtypes, expected_scores, expected = found_in_an_image()
    assert dtypes == expected_dtypes == ["float32"] * 3
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-6)
    assert len(expected) > 5
    assert_same_records(records, expected, exact=True)


def test_a_saved_embedding_replaces_the_image():
    image = random_image(70, 110)
    predictor = SamPredictor(small()[1])
    predictor.set_image(image)
    embedding = predictor.get_image_embedding()
    steps = []
    actual = generator().generate_from_embedding(
        embedding, (70, 110), on_batch=lambda *step: steps.append(step)
    )
    assert_same_records(actual, generator().generate(image), exact=True)
    # 36 points fit into one batch; their masks follow, 16 at a time.
    assert steps[0] == (1, 1)
    assert steps[1:] == [(1, 1)] * -(-len(actual) // 16)
    with pytest.raises(ValueError, match="crop_n_layers is 1, and crops need the image"):
        generator(crop_n_layers=1).generate_from_embedding(embedding, (70, 110))
    with pytest.raises(ValueError, match=r"shape \(1, 2\), expected \(1, 32, 12, 12\)"):
        generator().generate_from_embedding(np.zeros((1, 2)), (70, 110))


@pytest.mark.slow
def test_an_error_in_on_batch_stops_the_work(monkeypatch):
    """No other batch is computed."""
    predictor = SamPredictor(small()[1])
    predictor.set_image(random_image(70, 110))
    batches = []
    measure = module.measure
    monkeypatch.setattr(
        module, "measure", lambda *args, **kw: batches.append(0) or measure(*args, **kw)
    )

    def stop(done, total):
        assert total == 6
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generator(points_per_batch=7).generate_from_embedding(
            predictor.get_image_embedding(), (70, 110), on_batch=stop
        )
    assert len(batches) == 2


@pytest.mark.slow
def test_another_image_compiles_nothing(compilations):
    some = generator(crop_n_layers=1)
    some.generate(random_image(100, 75))
    compilations.clear()
    some.generate(random_image(33, 250))
    some.generate(random_image(700, 1300))
    generator(crop_n_layers=1, pred_iou_thresh=0.3).generate(random_image(20, 20))
    assert compilations == []


@pytest.mark.usefixtures("unchecked")
def test_a_name_is_not_a_model():
    with pytest.raises(TypeError, match="model is 'mobile_sam', expected a Sam, such as"):
        SamAutomaticMaskGenerator("mobile_sam")


def test_other_kinds_of_images(tmp_path):
    image = random_image(40, 60)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = generator().generate(image)
    for given in (Image.fromarray(image), tmp_path / "image.png"):
        assert_same_records(generator().generate(given), expected, exact=True)


def with_ious(scale, bias):
    """The small model with changed predicted IoUs, which random weights do not keep in 0 to 1."""
    model = nnx.clone(small()[1])
    last = model.mask_decoder.iou_prediction_head.layers[-1]
    last.kernel[...] *= scale
    last.bias[...] = bias
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"pred_iou_thresh": 0.5},
        {"stability_score_thresh": 1.0, "stability_score_offset": 1e4, "crop_n_layers": 1},
        {"pred_iou_thresh": 0.5, "crop_n_layers": 2, "min_mask_region_area": 50},
    ],
    ids=str,
)
def test_nothing_survives(options):
    options = {**ALL, "points_per_side": 6, **options}
    nothing = SamAutomaticMaskGenerator(with_ious(0, 0.4), **options)
    assert nothing.generate(random_image(50, 80)) == []


def test_masks_at_a_limit():
    """As in Meta's code, a predicted IoU must exceed its limit; a stability may equal it."""
    model = with_ious(0.1, 0.5)

    def values(name, **limits):
        options = {**ALL, "stability_score_offset": 0.01, **limits}
        records = SamAutomaticMaskGenerator(model, 3, **options).generate(random_image(50, 80))
        return sorted({record[name] for record in records if record[name] > 0})

    ious, stabilities = values("predicted_iou"), values("stability_score")
    assert 0 < ious[0] < ious[-1] < 1
    assert values("predicted_iou", pred_iou_thresh=ious[1]) == ious[2:]
    assert values("stability_score", stability_score_thresh=stabilities[1]) == stabilities[1:]


@pytest.mark.slow
def test_blank_and_tiny_images():
    for size in ((64, 64), (1, 1), (1, 40), (3, 2)):
        records = generator(crop_n_layers=1).generate(np.zeros((*size, 3), np.uint8))
        assert records
        for record in records:
            assert record["area"] == record["segmentation"].sum()
            assert record["segmentation"].shape == size
            assert 0 <= record["stability_score"] <= 1


def test_empty_masks_are_valid_json():
    records = generator(output_mode="coco_rle").generate(random_image(50, 80))
    assert any(record["area"] == 0 for record in records)
    json.dumps(records, allow_nan=False)


@pytest.mark.slow
def test_bfloat16():
    model = ours(small()[0], SHALLOW, dtype=jax.numpy.bfloat16)
    image = random_image(50, 80)
    records = SamAutomaticMaskGenerator(model, **ALL, points_per_side=6).generate(image)
    assert len(records) > 20
    exact = generator(points_per_side=6).generate(image)

    def is_alike(record, other):
        alike = record["point_coords"] == other["point_coords"]
        alike &= abs(record["predicted_iou"] - other["predicted_iou"]) < 0.1
        return alike and mask_iou(segmentation(record), segmentation(other)) > 0.7

    found = [any(is_alike(record, other) for other in exact) for record in records]
    assert np.mean(found) > 0.9, np.mean(found)


@pytest.mark.usefixtures("unchecked")
def test_one_image_is_not_a_list():
    for image in (random_image(5, 5), "photo.jpg", Image.fromarray(random_image(5, 5))):
        with pytest.raises(TypeError, match=r"expected a list of images.*generate takes one"):
            generator().generate_batch(image)
    with pytest.raises(TypeError, match=r"mesh is 'x', expected a jax\.sharding\.Mesh"):
        generator(mesh="x")
