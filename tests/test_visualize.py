import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sam_jax.visualize import COLORS, overlay, show_box, show_mask, show_points

GREEN, RED = (40, 200, 80), (220, 50, 47)


@pytest.fixture
def image():
    return np.full((60, 80, 3), 100, np.uint8)


def square(top, left, bottom, right, shape=(60, 80)):
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


# --- overlay ------------------------------------------------------------------------------------


def test_nothing_to_draw_leaves_the_image(image, tmp_path):
    Image.fromarray(image).save(tmp_path / "image.png")
    for given in (image, Image.fromarray(image), tmp_path / "image.png", image[..., 0]):
        drawn = overlay(given)
        assert drawn.mode == "RGB"
        assert np.array_equal(drawn, image)
    empty = overlay(
        image, [], point_coords=np.zeros((0, 2)), point_labels=[], boxes=np.zeros((0, 4))
    )
    assert np.array_equal(empty, image)
    assert np.array_equal(overlay(image, [np.zeros((60, 80), bool)]), image)


def test_masks_are_tinted_and_outlined(image):
    first, second = square(10, 10, 20, 30), square(30, 40, 50, 70)
    pixels = np.asarray(overlay(image, np.stack([first, second])))
    for mask, color in ((first, COLORS[0]), (second, COLORS[1])):
        inside = np.zeros_like(mask)
        rows, columns = np.nonzero(mask)
        inside[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()] = True
        assert np.unique(pixels[inside], axis=0).tolist() == [
            np.round(0.45 * 100 + 0.55 * np.array(color)).tolist()
        ]
        assert (pixels[mask & ~inside] == 255).all()
    assert (pixels[~(first | second)] == 100).all()


def test_the_input_is_not_changed(image):
    overlay(
        image,
        [square(0, 0, 60, 80)],
        point_coords=[[5, 5]],
        point_labels=[1],
        boxes=[[1, 2, 30, 40]],
    )
    assert (image == 100).all()


def test_a_mask_to_the_edge_has_no_outline_there(image):
    pixels = np.asarray(overlay(image, [np.ones((60, 80), bool)]))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 1
    assert not (pixels == 255).all(-1).any()


def test_more_masks_than_colors(image):
    masks = [square(5 * i, 0, 5 * i + 4, 80) for i in range(len(COLORS) + 1)]
    pixels = np.asarray(overlay(image, masks))
    assert pixels[1, 40].tolist() == pixels[5 * len(COLORS) + 1, 40].tolist()


def test_points(image):
    pixels = np.asarray(
        overlay(
            image,
            (),
            point_coords=[[20, 15], [60, 40], [40, 30], [79, 59]],
            point_labels=[1, 0, -1, 1],
        )
    )
    assert tuple(pixels[15, 20]) == GREEN
    assert tuple(pixels[40, 60]) == RED
    assert tuple(pixels[30, 40]) == (100, 100, 100)  # padding is not drawn
    assert tuple(pixels[59, 79]) == GREEN
    ring = pixels[15, 10:31]
    assert (ring == 255).all(-1).sum() == 2


def test_boxes(image):
    pixels = np.asarray(overlay(image, boxes=[[10, 20, 50.0, 45.0], [60, 5, 70, 5]]))
    for y, x in ((20, 30), (45, 30), (30, 10), (30, 50), (5, 65)):
        assert tuple(pixels[y, x]) == GREEN
    assert tuple(pixels[32, 30]) == (100, 100, 100)
    assert tuple(pixels[18, 30]) == (100, 100, 100)


def test_marks_grow_with_the_image():
    small = np.asarray(
        overlay(np.zeros((100, 100, 3), np.uint8), (), point_coords=[[50, 50]], point_labels=[1])
    )
    large = np.asarray(
        overlay(
            np.zeros((2000, 2000, 3), np.uint8), (), point_coords=[[1000, 1000]], point_labels=[1]
        )
    )
    assert large.any(-1).sum() > 10 * small.any(-1).sum()


def test_an_image_of_one_pixel():
    pixel = np.zeros((1, 1, 3), np.uint8)
    mask = np.ones((1, 1), bool)
    assert overlay(
        pixel, [mask], point_coords=[[0, 0]], point_labels=[1], boxes=[[0, 0, 0, 0]]
    ).size == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": [square(0, 0, 1, 1, (60, 81))]}, r"masks\[0\] has shape \(60, 81\), expected"),
        ({"masks": square(0, 0, 1, 1)}, r"masks\[0\] is bool \(80,\), .* one mask alone is m"),
        (
            {"masks": [square(0, 0, 1, 1), np.zeros((60, 80), np.float32)]},
            r"masks\[1\] is float32 \(60, 80\), expected bool \(h, w\); compare logits with 0",
        ),
        ({"point_coords": [[1, 2], [3, 4]], "point_labels": [1]}, "are 2 points, but their labels"),
        ({"point_coords": [[1, 2]]}, r"are 1 points, but their labels have shape \(0,\)"),
        ({"point_coords": [1, 2], "point_labels": [1]}, r"have shape \(2,\), expected \(n, 2\)"),
        ({"point_coords": [[1, 2]], "point_labels": [7]}, r"have labels \[7.0\]; known are"),
        ({"boxes": [1, 2, 3, 4]}, r"boxes have shape \(4,\), expected \(n, 4\)"),
        ({"boxes": [[5, 2, 3, 4]]}, r"boxes have \[5.0, 2.0, 3.0, 4.0\], expected x0, y0, x1, y1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs(image, options, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, **options)


# --- on matplotlib's axes -----------------------------------------------------------------------


@pytest.fixture
def axes(image):
    """Axes that fill a figure of the image's size, so that its pixels are the image's."""
    figure = Figure(figsize=(8, 6), dpi=10)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(image)
    return axes


def drawn(axes):
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.slow
def test_import_chooses_no_backend():
    """The caller chooses it, in notebooks and in scripts."""
    program = (
        "import sys, sam_jax.visualize as v; v.show_box([0, 0, 1, 1], type('Axes', (), {"
        "'add_patch': print})()); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_show_mask(axes):
    mask = square(10, 10, 40, 50)
    assert show_mask(mask, axes) in axes.images
    pixels = drawn(axes)
    expected = 0.45 * 100 + 0.55 * np.array(COLORS[0])
    assert np.abs(pixels[25, 30] - expected).max() <= 1
    assert pixels[50, 70].tolist() == [100, 100, 100]
    show_mask(square(45, 60, 58, 78), axes, color=COLORS[1])
    expected = 0.45 * 100 + 0.55 * np.array(COLORS[1])
    assert np.abs(drawn(axes)[50, 70] - expected).max() <= 1


def test_show_points(axes):
    show_points([[20, 15], [60, 40], [70, 10]], [1, 0, -1], axes, size=30_000.0)
    pixels = drawn(axes)
    assert tuple(pixels[15, 20]) == GREEN
    assert tuple(pixels[40, 60]) == RED
    assert pixels[10, 70].tolist() == [100, 100, 100]
    show_points(np.zeros((0, 2)), [], axes)
    show_points(np.array([[1.0, 2.0]]), np.array([1]), axes)


def test_show_box(axes):
    assert show_box([10, 20, 50, 45], axes) in axes.patches
    (box,) = axes.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((10, 20), 40, 25)
    show_box(np.array([1, 2, 3, 4]), axes)
    assert len(axes.patches) == 2


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda axes: show_mask(np.zeros((60, 80)), axes), "mask is float64 "),
        (
            lambda axes: show_mask(np.zeros((1, 60, 80), bool), axes),
            r"is bool \(1, 60, 80\), expect",
        ),
        (lambda axes: show_points([[1, 2]], [1, 0], axes), r"labels have shape \(2,\)"),
        (lambda axes: show_points([1, 2], [1], axes), r"coords have shape \(2,\)"),
        (lambda axes: show_box([[1, 2, 3, 4]], axes), r"box have shape \(1, 1, 4\)"),
        (lambda axes: show_box([3, 2, 1, 4], axes), r"box have \[3.0, 2.0, 1.0, 4.0\]"),
    ],
)
def test_axes_refuse_bad_inputs(axes, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(axes)
