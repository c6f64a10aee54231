import collections
import contextlib
import io
import json
import os
import re

import jax
import numpy as np
import pytest
import tifffile
from image_files import DEEP, NARROWED, UNREAD, eps, write_deep
from PIL import EpsImagePlugin, Image, ImageOps
from reference import SHALLOW, random_sam

from sam_jax import SamPredictor, SamProcessor, cli, pipeline
from sam_jax.demo.session import open_image_file
from sam_jax.image import FORMATS, load_image, read_stored
from sam_jax.training.datasets import open_annotations
from sam_jax.visualize import overlay

REMEDY = "read it with another library, .* give them as a uint8 array or in a new file"


def random_image(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def modes():
    rgb = Image.fromarray(random_image(12, 17))
    palette = rgb.quantize(16)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes(range(0, 160, 10))
    one_color = palette.copy()
    one_color.info["transparency"] = 3
    images = {m: rgb.convert(m) for m in ("RGB", "L", "LA", "RGBA", "1", "CMYK", "YCbCr")}
    return images | {"P": palette, "P_bytes": transparent, "P_int": one_color}


@pytest.mark.parametrize("mode", modes())
def test_pil_modes(mode, tmp_path):
    image = modes()[mode]
    expected = np.asarray(image.convert("RGBA" if mode.startswith("P") else image.mode))
    if image.mode in ("CMYK", "YCbCr", "1"):
        expected = np.asarray(image.convert("RGB"))
    if image.mode in ("L", "LA"):
        expected = np.repeat(expected.reshape(12, 17, -1)[..., :1], 3, axis=-1)
    found = load_image(image)
    assert found.dtype == np.uint8
    assert found.shape == (12, 17, 3)
    assert found.flags.c_contiguous
    assert np.array_equal(found, expected[..., :3])
    if image.mode not in ("CMYK", "YCbCr"):  # PNG lacks these modes
        image.save(tmp_path / "image.png")
        assert np.array_equal(load_image(tmp_path / "image.png"), found)
        assert np.array_equal(load_image(str(tmp_path / "image.png")), found)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_dropped(mode):
    opaque = Image.fromarray(random_image(12, 17)).convert(mode.upper())
    assert np.array_equal(load_image(opaque.convert(mode)), load_image(opaque))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pil_modes_are_refused(mode):
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray(np.full((4, 5), 700, dtype))
    assert image.mode == mode
    with pytest.raises(TypeError, match=rf"\(mode {mode}\) has more than 8 bits.*{REMEDY}"):
        load_image(image)


@pytest.mark.parametrize("kind", [*NARROWED, *UNREAD])
def test_files_of_more_than_8_bits_are_refused(kind, tmp_path):
    """The hint is the same whether Pillow would read the high byte, clip, or fail."""
    path = write_deep(tmp_path / "image.jpg", kind)
    with pytest.raises((TypeError, ValueError), match=rf"8 bits per channel.*{REMEDY}"):
        load_image(path)
    if kind in NARROWED:
        with (
            Image.open(path) as image,
            pytest.raises(TypeError, match=rf"more than 8 bits per channel.*{REMEDY}"),
        ):
            load_image(image)


@pytest.mark.parametrize("file_format", sorted({*FORMATS} - {"PSD"}))  # Pillow cannot write it
def test_formats_by_content(file_format, tmp_path):
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[:16, 16:] = 200, 120, 40
    with (tmp_path / "image.eps").open("wb") as file:
        Image.fromarray(expected).save(file, file_format)
    found = load_image(tmp_path / "image.eps")
    assert np.array_equal(load_image(io.BytesIO((tmp_path / "image.eps").read_bytes())), found)
    assert found.shape == expected.shape
    assert abs(found.astype(int) - expected).mean() < 2


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.png")
    assert load_image("~/red.png").tolist() == [[[255, 0, 0]] * 3] * 2


def test_frames_of_a_file(tmp_path):
    first, second = (Image.fromarray(random_image(9, 8, seed)) for seed in (0, 1))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    assert np.array_equal(load_image(tmp_path / "pages.tif"), first)
    with Image.open(tmp_path / "pages.tif") as image:
        image.seek(1)
        assert np.array_equal(load_image(image), second)
    tifffile.imwrite(tmp_path / "pages.tif", np.asarray(first), photometric="rgb")
    tifffile.imwrite(tmp_path / "pages.tif", DEEP, photometric="rgb", append=True)
    with Image.open(tmp_path / "pages.tif") as image:
        assert np.array_equal(load_image(image), first)
        image.seek(1)
        with pytest.raises(TypeError, match="more than 8 bits per channel"):
            load_image(image)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that is written when Ghostscript runs."""
    program, written = tmp_path / "bin" / "gs", tmp_path / "canary"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho gs ran >> '{written}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # forgets where it was found
    return written


def train_on(path):
    folder = path.parent
    rle = {"size": [9, 9], "counts": [9, 72]}
    content = {
        "images": [{"id": 1, "file_name": path.name, "height": 9, "width": 9}],
        "annotations": [{"id": 1, "image_id": 1, "segmentation": rle}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return open_annotations(folder / "coco.json", folder)[0]


def predict(**prompt):
    predictor = SamPredictor(random_sam(SHALLOW))
    predictor.set_image(np.zeros((9, 9, 3), np.uint8))
    predictor.predict(**prompt)


ROUTES = {
    "load_image": load_image,
    "processor": SamProcessor(SHALLOW),
    "predictor": lambda image: SamPredictor(random_sam(SHALLOW)).set_image(image),
    "pipeline": lambda image: pipeline(model=random_sam(SHALLOW))(image),
    "overlay": lambda image: overlay(image, np.zeros((1, 9, 9), bool)),
    "labels": lambda image: SamProcessor(SHALLOW)(
        np.zeros((9, 9, 3), np.uint8), segmentation_maps=image
    ),
    "mask": SamProcessor(SHALLOW).mask_to_logits,
    "mask_input": lambda image: predict(mask_input=image),
    "mask_inputs": lambda image: predict(mask_input=[image]),
    "nested": lambda image: SamProcessor(SHALLOW).mask_to_logits(collections.deque([(image,)])),
    "overlaid": lambda image: overlay(np.zeros((9, 9, 3), np.uint8), [image]),
    "masks": lambda image: SamProcessor(SHALLOW).post_process_masks([image], [[9, 9]], [[96, 96]]),
    "points": lambda image: SamProcessor(SHALLOW)(
        np.zeros((9, 9, 3), np.uint8), input_points=[[[image]]]
    ),
    "training": train_on,
    "command": lambda image: cli.segment(cli.Segment(image, point=["1,1"])),
    "page": lambda image: open_image_file(SamPredictor(random_sam(SHALLOW)), image.read_bytes()),
}


FILES = "load_image", "processor", "predictor", "pipeline", "overlay", "training", "command", "page"
WAYS = [
    *((route, name) for route in FILES for name in ("a.jpg", "a.eps")),
    *((route, "opened") for route in ROUTES if route not in ("training", "command", "page")),
]


@pytest.mark.parametrize(("route", "name"), WAYS)
def test_no_image_runs_a_program(route, name, tmp_path, canary):
    path = tmp_path / ("a.jpg" if name == "opened" else name)
    path.write_bytes(eps())
    with contextlib.ExitStack() as stack:
        # Pillow reads only the header until it is asked for pixels.
        image = stack.enter_context(Image.open(path)) if name == "opened" else path
        with pytest.raises((ValueError, OSError)) as error:
            ROUTES[route](image)
    assert not canary.exists()
    assert re.search("format is EPS|not an image of a known format", str(error.value))
    with contextlib.suppress(Exception), Image.open(path) as opened:
        opened.load()
    assert canary.exists()  # Pillow alone runs the program


def test_arrays():
    rgb = random_image(6, 8)
    gray = rgb[..., 0]
    three = np.stack([gray] * 3, -1)
    assert np.array_equal(load_image(rgb), rgb)
    assert np.array_equal(load_image(jax.device_put(rgb)), rgb)
    assert np.array_equal(load_image(gray), three)
    assert np.array_equal(load_image(gray[..., None]), three)
    assert np.array_equal(load_image(np.dstack([rgb, gray])), rgb)
    for given in (rgb[::-1], rgb[:, ::-1], rgb[..., ::-1], rgb[::2, 1::3], np.asfortranarray(rgb)):
        found = load_image(given)
        assert np.array_equal(found, given)
        assert found.flags.c_contiguous
    read_only = rgb.copy()
    read_only.flags.writeable = False
    assert np.array_equal(load_image(read_only), rgb)
    assert load_image(rgb[:, :1]).shape == (6, 1, 3)
    assert load_image(gray[:1, :1]).shape == (1, 1, 3)


@pytest.mark.parametrize("dtype", [bool, np.float32, np.float64, np.uint16, np.int64])
def test_other_dtypes_are_refused(dtype):
    how = "scale it to that" if np.issubdtype(dtype, np.integer) else "convert it, such as"
    message = f"dtype is {np.dtype(dtype)}, expected uint8 with values 0 to 255; {how}"
    with pytest.raises(TypeError, match=message):
        load_image(np.zeros((4, 5, 3), dtype))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 40, 50), r"\(3, 40, 50\), expected \(h, w\).*channels first: use image.transpose"),
        ((1, 40, 50), "channels first"),
        ((40, 50, 2), r"\(40, 50, 2\), expected"),
        ((2, 40, 50, 3), r"\(2, 40, 50, 3\), expected .*; give several images as a list"),
        ((7,), r"\(7,\), expected"),
        ((), r"\(\), expected"),
        ((0, 5, 3), r"the image is empty: its shape is \(0, 5, 3\)"),
        ((5, 0), "the image is empty"),
    ],
    ids=str,
)
def test_other_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        load_image(np.zeros(shape, np.uint8))


def test_an_empty_pil_image_is_refused():
    with pytest.raises(ValueError, match="the image is empty"):
        load_image(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_files(orientation, suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if suffix in ("png", "tif") else {"quality": 100}
    Image.fromarray(random_image(20, 30)).save(path, exif=exif, **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(load_image(path), expected)
    stored, found = read_stored(path)
    assert found == orientation
    assert stored.shape == (20, 30, 3)
    if suffix in ("png", "tif"):
        assert np.array_equal(stored, random_image(20, 30))


def test_bad_files(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(random_image(64, 64)).save(whole)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"truncated\.png cannot be read: .+"):
        load_image(truncated)
    text = tmp_path / "notes.txt"
    text.write_text("no image at all")
    with pytest.raises(ValueError, match=r"notes\.txt is not an image of a known format"):
        load_image(text)
    with pytest.raises(ValueError, match=r"is a folder, expected an image"):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory.*missing\.png"):
        load_image(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is not a regular file, expected an image"):
        load_image(tmp_path / "pipe.png")


def test_a_file_with_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(random_image(64, 64)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"cannot be read as an image: .*4096 pixels"):
        load_image(tmp_path / "image.png")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [None, [[1, 2], [3, 4]], 5, b"bytes"])
def test_other_types_are_refused(value):
    message = f"the image is a {type(value).__name__}, expected a PIL image, an array"
    with pytest.raises(TypeError, match=message):
        load_image(value)
    with pytest.raises(TypeError, match=r"the image is a .*, expected a PIL image"):
        SamProcessor(SHALLOW)(value)
