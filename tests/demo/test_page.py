"""The demo page in headless Chromium, with the real weights, as `sam-jax demo` serves it."""

import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pycocotools.mask
import pytest
import skimage.data
from browser import Page, find_chromium, open_browser, running_demo
from PIL import Image
from reference import mask_iou
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import sam_jax.demo
from sam_jax import SamPredictor, from_pretrained
from sam_jax.visualize import MARKS

pytestmark = pytest.mark.slow

CUP, MIDDLE, OFF, FACE = (0.55, 0.3), (0.55, 0.5), (0.9, 0.9), (0.44, 0.25)


@pytest.fixture(scope="module")
def chromium():
    if not find_chromium() and not os.environ.get("CI"):
        pytest.skip("chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(chromium, downloads):
    with open_browser(downloads) as browser:
        yield browser


@pytest.fixture(scope="module")
def address(chromium, mobile_sam_file, tmp_path_factory):
    """The page's address."""
    arguments = "--model", str(mobile_sam_file), "--max-megabytes", "2"
    folder = tmp_path_factory.mktemp("server")
    with running_demo(folder, *arguments, stop=signal.SIGTERM) as address:
        yield address


@pytest.fixture(scope="module")
def model(mobile_sam_file):
    """The model, compiled with optimizations, since it runs longer than it compiles."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield from_pretrained(mobile_sam_file)
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def turned(downloads):
    """A large photo that a camera took on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(skimage.data.coffee()).resize((3000, 2000), Image.Resampling.BICUBIC)
    photo.save(downloads / "turned photo.v2.jpg", exif=exif)
    return downloads / "turned photo.v2.jpg"


@pytest.fixture(scope="module")
def plain(downloads):
    Image.fromarray(skimage.data.astronaut()).save(downloads / "plain.jpg")
    return downloads / "plain.jpg"


def replay(predictor, steps):
    """Repeats the steps of a saved file; returns the mask and its predicted IoU."""
    points, box, before = [], None, None
    for step in steps:
        if "point" in step:
            points.append(step["point"])
        else:
            box, before = step["box"], None
        alone = len(points) == 1 and box is None
        masks, scores, logits = predictor.predict(
            [p[:2] for p in points] or None,
            [p[2] for p in points] or None,
            box,
            before,
            multimask_output=alone,
        )
        chosen = np.argsort(-scores)[step["candidate"]]
        before = logits[chosen][None]
    return masks[chosen], float(scores[chosen])


def check(page, predictor, *places, labels=()):
    """Checks that the saved files match the page, and the predictor's result for these marks.

    Returns:
        The saved steps.
    """
    image, saved, names = page.saved()
    assert names == ["turned photo.v2_mask.png", "turned photo.v2_mask.json"]
    height, width = predictor.original_size
    assert (saved["width"], saved["height"]) == image.size == (width, height)
    prompt = saved["prompt"]
    given = [*prompt.get("point_coords", []), *np.reshape(prompt.get("box", []), (-1, 2))]
    pixel = width / page.find(".stage").size["width"]
    # The page rounds by half a pixel of the screen, and WebDriver rounds the stage's center.
    assert np.abs(np.array(given) - np.array(places) * (width, height)).max() <= 1 + 1.5 * pixel
    assert prompt.get("point_labels", []) == list(labels)
    mask, score = replay(predictor, saved["steps"])
    assert image.mode == "1"
    assert np.array_equal(np.asarray(image), mask)
    (record,) = saved["masks"]
    assert np.array_equal(pycocotools.mask.decode(record["segmentation"]), mask)
    assert record["predicted_iou"] == pytest.approx(score, abs=1e-5)
    shown = page.layer()
    full = Image.fromarray(mask).resize(shown.shape[::-1])
    assert mask_iou(shown[None], np.asarray(full)[None]).min() > 0.98
    return saved["steps"]


def positions(page):
    """The positions of the buttons."""
    buttons = page.browser.find_elements(By.CSS_SELECTOR, "aside button, aside input:not([hidden])")
    return [button.rect for button in buttons]


def test_page(browser, address, downloads, model, turned, plain):
    """Two visitors in turn do everything that the page offers."""
    predictor = SamPredictor(model)
    predictor.set_image(turned)
    assert predictor.original_size == (3000, 2000)
    page = Page(browser, address, downloads)
    page.choose(turned)
    size = page.find(".stage").size
    assert size["width"] / size["height"] == pytest.approx(2 / 3, rel=0.01)
    assert not page.find("#png").is_enabled()

    # A point and its candidates; the buttons do not move.
    before = positions(page)
    with page.change():
        page.mouse(CUP)
    assert positions(page) == before
    check(page, predictor, CUP, labels=[1])
    scores = [float(score) for score in re.findall(r"0\.\d\d|1\.00", page.find("#candidates").text)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    for candidate in (1, 2, 0):
        with page.change():
            if candidate == 2:
                page.run("document.querySelectorAll('#candidates input')[2].click()")
            else:
                page.press("next")
        (step,) = check(page, predictor, CUP, labels=[1])
        assert step["candidate"] == candidate

    # Background points by the radio button and by a right click; Ctrl-Z undoes the second.
    with page.change():
        page.run("document.querySelectorAll('#label input')[1].click()")
        page.mouse(MIDDLE)
    two = page.layer()
    page.run("document.querySelectorAll('#label input')[0].click()")
    with page.change():
        page.mouse(OFF, button="context_click")
    check(page, predictor, CUP, MIDDLE, OFF, labels=[1, 0, 0])
    assert len(browser.find_elements(By.CSS_SELECTOR, ".points .label0")) == 2
    with page.change():
        ActionChains(browser).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    assert np.array_equal(page.layer(), two)
    check(page, predictor, CUP, MIDDLE, labels=[1, 0])

    # A box from its lower right corner, which a point then refines.
    page.press("clear")
    page.wait(lambda: page.layer() is None and not page.find("#undo").is_enabled())
    with page.change():
        page.mouse((0.9, 0.55), (0.5, 0.4), (0.2, 0.1))
    check(page, predictor, (0.2, 0.1), (0.9, 0.55))
    with page.change():
        page.mouse(CUP)
    check(page, predictor, CUP, (0.2, 0.1), (0.9, 0.55), labels=[1])

    # Files that are not images, or too large, give an error, and the image stays.
    shown = page.layer()
    (downloads / "text.jpg").write_text("not an image")
    (downloads / "large.jpg").write_bytes(bytes(2_100_000))
    Image.new("1", (10_000, 6_000)).save(downloads / "many.png")
    for name, message in (
        ("text.jpg", "The file is not an image of a known format"),
        ("many.png", "The image has 10000 x 6000 pixels, expected at most 50 million"),
        ("large.jpg", "The file has 2.1 MB; the limit is 2 MB"),
    ):
        page.find("#file").send_keys(str(downloads / name))
        page.wait(lambda message=message: message in page.error())
    assert np.array_equal(page.layer(), shown)

    # Everything mode, which a click ends.
    page.set_points_per_side(32)
    page.press("all")
    page.wait(lambda: "of 128 steps" in page.find("#status").text)
    with page.change():
        page.mouse(MIDDLE)
    page.wait(lambda: not page.find("#status").text)
    page.set_points_per_side(4)
    with page.change():
        page.press("all")
        page.wait(lambda: not page.find("#undo").is_enabled())
    image, saved, names = page.saved()
    assert names == ["turned photo.v2_everything.png", "turned photo.v2_everything.json"]
    assert len(saved["masks"]) >= 3
    masks = [pycocotools.mask.decode(record["segmentation"]) for record in saved["masks"]]
    assert np.array_equal(np.asarray(image) > 0, np.any(masks, axis=0))

    # Another tab is another visitor, who drops a file on the page and uses only the keyboard.
    other = Page(browser, address, downloads)
    other.drop(plain)
    by_keyboard(other)
    page.front()
    assert page.layer() is not None

    names = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) >= 4
    assert not [name for name in names if not name.startswith((address, "data:", "blob:"))]
    errors = [
        entry for entry in browser.get_log("browser") if "status of 4" not in entry["message"]
    ]
    assert not errors  # such as violations of the page's security policy


def by_keyboard(page):
    for _ in range(20):
        page.keys(Keys.TAB)
        if "stage" in page.run("return document.activeElement.className"):
            break
    stage, cross = page.find(".stage"), page.find(".cross")
    assert stage.get_attribute("role") == "application"
    assert "Arrow keys" in stage.get_attribute("aria-label")
    outline = "return getComputedStyle(arguments[0]).outlineStyle"
    assert page.run(outline, stage) == "solid"
    assert cross.is_displayed()

    # From the center (256, 256), in steps of 3 pixels, or of 30 with Shift.
    far = Keys.SHIFT, *[Keys.ARROW_UP] * 4, Keys.NULL
    page.keys(*far, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_DOWN)
    center, inside = cross.rect, stage.rect
    assert center["x"] + 16 == pytest.approx(inside["x"] + 250.5 / 512 * inside["width"], abs=1.5)
    assert center["y"] + 16 == pytest.approx(inside["y"] + 139.5 / 512 * inside["height"], abs=1.5)
    with page.change():
        page.keys(Keys.ENTER)
    one = page.layer()
    with page.change():
        page.keys(Keys.ARROW_RIGHT, "B")
    with page.change():
        page.keys(Keys.BACKSPACE)
    assert np.array_equal(page.layer(), one)
    # Backspace also removes the first corner of a box.
    with page.change():
        page.keys("x", Keys.ESCAPE, *[Keys.ARROW_RIGHT] * 2, "x", *[Keys.ARROW_LEFT] * 9)
        assert page.find(".pending").is_displayed()
        page.keys(Keys.SHIFT, *[Keys.ARROW_UP] * 3, Keys.NULL, "x")
    prompt = page.saved()[1]["prompt"]
    assert prompt["point_coords"] == [[250, 139]]
    assert prompt["box"] == [232, 49, 259, 139]


def test_phone(chromium, address, downloads, plain):
    """390 pixels wide, with a finger instead of a mouse."""
    with open_browser(downloads / "phone", phone=True) as browser:
        page = Page(browser, address, downloads)
        text = page.find("body").text
        assert "Tap" in text
        assert "ight-click" not in text
        assert page.run("return document.documentElement.scrollWidth") <= 390
        page.choose(plain)
        with page.change():
            finger(browser, page.find(".stage"), [(0.44, 0.25)])
        page.run("document.querySelectorAll('#label input')[1].click()")
        with page.change():
            finger(browser, page.find(".stage"), [(0.9, 0.1)])
        assert len(browser.find_elements(By.CSS_SELECTOR, ".points i")) == 2
        shown = page.layer()
        finger(browser, page.find(".stage"), [(0.5, 0.9 - 0.1 * i) for i in range(8)])
        page.wait(lambda: page.run("return scrollY") > 50)
        assert np.array_equal(page.layer(), shown)
        page.run("scrollTo(0, 0)")
        with page.change():
            finger(
                browser, page.find(".stage"), [(0.2 + 0.1 * i, 0.1 + 0.07 * i) for i in range(6)]
            )
        assert page.find(".box").is_displayed()


def finger(browser, element, places):
    """Touches the first place, moves along the others, and lifts."""
    box = element.rect
    scroll = browser.execute_script("return scrollY")
    points = [
        {"x": box["x"] + x * box["width"], "y": box["y"] - scroll + y * box["height"]}
        for x, y in places
    ]
    for kind, at in (
        ("touchStart", points[:1]),
        *[("touchMove", [point]) for point in points[1:]],
        ("touchEnd", []),
    ):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})


def test_colors_match_visualize():
    folder = Path(sam_jax.demo.__file__).parent
    css = (folder / "stage.css").read_text()
    assert [f"rgb{MARKS[label]}" in css for label in (0, 1)] == [True, True]
    # The contrast of text and background, in light and dark: WCAG asks for 4.5.
    css = (folder / "page.css").read_text()
    for values in re.findall(r":root \{[^{}]*\}", css):
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]+)", values))
        for front, back in (("hint", "panel"), ("text", "panel"), ("text", "page")):
            assert contrast(colors[front], colors[back]) >= 4.5
        assert contrast("#fff", colors["accent"]) >= 4.5


def contrast(one, other):
    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        srgb = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
