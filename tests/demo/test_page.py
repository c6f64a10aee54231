"""The demo page: as its visitors' browsers ask for it, and in headless Chromium as they use it."""

import asyncio
import contextlib
import gc
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import jax
import numpy as np
import pycocotools.mask
import pytest
import skimage.data
from browser import (
    Page,
    find_chromium,
    free_port,
    open_browser,
    process_environment,
    running_demo,
)
from cores import all_cores
from PIL import Image
from reference import SMALL, mask_iou, meta_sam, ours
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from visitor import Visitor

from sam_jax import SamPredictor, from_pretrained
from sam_jax.demo import page as demo
from sam_jax.demo import server, visit
from sam_jax.demo.visit import Point, Visit

# Gradio leaves its loops open, and uses what pandas is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")

# Events as they are sent, to a small model's page in this process.


@contextlib.contextmanager
def launched(model, **constants):
    """The address of a model's page, with few visitors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GRADIO_TEMP_DIR", raising=False)
        patch.setattr(server, "VISITORS", 3)
        for name, value in constants.items():
            patch.setattr(demo, name, value)
        port = free_port()
        with server.launch_page(model, "127.0.0.1", port, 1):
            yield f"http://127.0.0.1:{port}/"
        asyncio.set_event_loop(None)  # gradio's, of this thread
        gc.collect()  # while its warnings are ignored


@pytest.fixture(scope="module")
def small():
    return ours(meta_sam(SMALL), SMALL)


@pytest.fixture(scope="module")
def site(small):
    with launched(small) as address:
        yield address


@pytest.fixture
def photo():
    """A file's content; of the picture each is different."""
    pixels = np.random.default_rng(0).integers(0, 256, (71, 113, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def guest(site, photo, capsys):
    """A visitor who has opened a picture; what was done leaves no traceback."""
    guest = Visitor(site)
    assert "error" not in guest.open(guest.upload(photo))
    yield guest
    assert "Traceback" not in capsys.readouterr().err


CLICK = {"x": 50, "y": 30, "right": False}


def shown(result):
    """What is set on the stage."""
    (stage,) = [u["props"] for u in result["data"] if u and "points" in u.get("props", {})]
    return stage


def stored():
    """The files that the page has."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_upload_is_deleted_once_it_is_opened(guest, photo):
    before = set(stored())
    for content, error in ((photo, None), (b"no picture", "The file is not a picture of a known")):
        file = guest.upload(content)
        assert [str(path) for path in set(stored()) - before] == [file["path"]]
        answer = guest.open(file)
        assert (error or "") in answer.get("error", "")
        assert bool(error) == ("error" in answer)
        assert set(stored()) == before
    # Another's of the same content is another file.
    files = [guest.upload(photo) for _ in range(2)]
    for file in files:
        assert "error" not in guest.open(file)
    assert guest.open(files[0])["error"].startswith("The picture cannot be read: ")
    assert guest.open(None)["error"] == "No file was sent"


def test_who_breaks_an_upload_off_leaves_nothing(site, guest):
    before = set(stored())
    port = int(site.split(":")[2].strip("/"))
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1400000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        'Content-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + bytes(1_200_000))
        time.sleep(0.2)
        assert set(stored()) == before
    time.sleep(0.2)
    assert set(stored()) == before
    assert "mask" in shown(guest.send("press", 1, **CLICK))


@pytest.mark.parametrize(
    ("name", "values", "event", "error"),
    [
        ("press", [1], {**CLICK, "x": float("nan")}, "X is nan, expected a whole number from "),
        ("press", [1], {**CLICK, "y": float("inf")}, "Y is inf, expected"),
        ("press", [1], {**CLICK, "x": "7"}, "X is '7', expected"),
        ("press", [1], {**CLICK, "x": 7.5}, "X is 7.5, expected"),
        ("press", [1], {**CLICK, "x": -(10**400)}, "X is -1000"),
        ("press", [1], {**CLICK, "x": [1] * 1000}, "X is [1, 1, 1, 1, 1, 1, ...], expected"),
        ("press", [1], {"y": 3, "right": False}, "X is None, expected"),
        ("press", [1], {"x": 3, "y": 3}, "Right is None, expected"),
        ("press", [1], {}, "X is None, expected"),
        ("press", [2], CLICK, "The label is 2, expected a whole number from 0 to 1"),
        ("press", ["object"], CLICK, "The label is 'object', expected"),
        ("press", [None], CLICK, "The label is None, expected"),
        ("drag", [], {"x0": 1, "y0": 1, "x1": 9}, "Y1 is None, expected"),
        ("drag", [], {"x0": 1, "y0": 1, "x1": 9, "y1": float("nan")}, "Y1 is nan, expected"),
        ("select", [1], {}, "The candidate is 1, expected a whole number from 0 to 0"),
        ("select", [-1], {}, "The candidate is -1, expected"),
        ("select", ["0"], {}, "The candidate is '0', expected"),
        ("find", [10**6], {}, "points per side is 1000000, expected a whole number from 4 to 32"),
        ("find", [0], {}, "points per side is 0, expected"),
        ("find", ["16"], {}, "points per side is '16', expected"),
        ("find", [float("nan")], {}, "points per side is nan, expected"),
        ("find", [None], {}, "points per side is None, expected"),
    ],
)
def test_events_that_no_page_sends_are_refused(guest, name, values, event, error):
    started = time.monotonic()
    assert error in guest.send(name, *values, **event)["error"]
    assert time.monotonic() - started < 20
    assert guest.send("save")["data"] == [None]  # the visit is as it was


def test_far_outside_is_at_the_edge(guest):
    stage = shown(guest.send("press", 1, **{**CLICK, "x": 10**9, "y": -(10**9)}))
    assert stage["points"] == [[112, 0, 1]]
    assert stage["mask"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("why", ["others", "time"])
def test_who_was_dropped_is_told_and_can_open_again(small, site, photo, why):
    with contextlib.ExitStack() as stack:
        if why == "time":
            site = stack.enter_context(launched(small, FORGET=0.5))
        guest = Visitor(site)
        guest.open(guest.upload(photo))
        assert shown(guest.send("press", 1, **CLICK))["points"] == [[50, 30, 1]]
        if why == "time":
            while "error" in guest.send("find", 0):  # of whose picture is there
                time.sleep(0.1)
        else:
            for _ in range(3):
                Visitor(site).send("clear")
        for name, values, event in (("press", [1], CLICK), ("undo", [], {}), ("select", [0], {})):
            answer = guest.send(name, *values, **event)
            assert answer["log"] == demo._GONE
            assert shown(answer)["picture"] == shown(answer)["mask"] == ""
            assert shown(answer)["points"] == []
        # What was to be saved and to be found, too.
        for name in ("save", "show_saved"):
            assert "error" not in guest.send(name)
        guest.send("find", 4)
        assert guest.send("show_found")["log"] == demo._GONE
        guest.open(guest.upload(photo))
        assert shown(guest.send("press", 1, **CLICK))["points"] == [[50, 30, 1]]


@pytest.fixture
def endless(monkeypatch):
    """In the place of everything-mode, what ends when it is stopped only."""

    class Endless:
        running, stopped = threading.Event(), threading.Event()

        def __call__(self, model, picture, points_per_side, on_batch):
            self.running.set()
            try:
                for i in range(1000):
                    on_batch(i, 1000)
                    time.sleep(0.01)
            except BaseException:
                self.stopped.set()
                raise

    monkeypatch.setattr(demo, "find_everything", endless := Endless())
    return endless


def test_clicks_do_not_wait_for_others_pictures(site, guest, photo, monkeypatch):
    begun, may_end, open_picture = threading.Event(), threading.Event(), visit.open_picture

    def slow(*args):
        begun.set()
        assert may_end.wait(60)
        return open_picture(*args)

    monkeypatch.setattr(demo, "open_picture", slow)
    other = Visitor(site)
    other.join("open_", other.upload(photo))
    assert begun.wait(20)
    assert shown(guest.send("press", 1, **CLICK))["points"] == [[50, 30, 1]]
    may_end.set()
    with other.messages() as messages:
        assert [m["success"] for m in messages if m["msg"] == "process_completed"] == [True]
    assert shown(other.send("show_opened"))["picture"].startswith("data:image/jpeg;base64,")


def test_the_last_of_two_pictures_stays(guest, photo):
    """Both are embedded before the clicks' turn comes to showing the first."""
    for _ in range(2):
        assert "error" not in guest.send("open_", guest.upload(photo))
    assert shown(guest.send("show_opened"))["picture"]
    guest.send("press", 1, **CLICK)
    answer = guest.send("show_opened")
    assert answer["log"] is None
    assert not any(u and "points" in u.get("props", {}) for u in answer["data"])
    assert len(shown(guest.send("press", 1, **CLICK))["points"]) == 2


@pytest.mark.parametrize("how", ["leaves", "opens"])
def test_everything_ends_with_its_visitor(guest, photo, endless, how):
    # Every page holds a connection, by whose end it is known to be closed.
    with guest.http.stream("GET", f"heartbeat/{guest.session}"):
        if how == "opens":
            file = guest.upload(photo)
        guest.join("find", 4)
        assert endless.running.wait(20)
        if how == "opens":
            guest.join("open_", file)
            assert endless.stopped.wait(20)
            with guest.messages() as messages:  # neither has an error
                ends = [m["success"] for m in messages if m["msg"] == "process_completed"]
            assert ends == [True, True]
            found = guest.send("show_found")
            assert not any("mask" in update.get("props", {}) for update in found["data"] if update)
            return
        assert not endless.stopped.is_set()
    assert endless.stopped.wait(20)


def test_everything_ends_with_the_server(small, photo, endless):
    with launched(small) as address:
        guest = Visitor(address)
        guest.open(guest.upload(photo))
        guest.join("find", 4)
        assert endless.running.wait(20)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert endless.stopped.is_set()
    assert not folder.exists()


def test_everything_of_others_goes_on(site, guest, photo, endless):
    guest.join("find", 4)
    assert endless.running.wait(20)
    other = Visitor(site)
    with other.http.stream("GET", f"heartbeat/{other.session}"):
        other.open(other.upload(photo))
        other.send("press", 1, **CLICK)
    assert not endless.stopped.wait(0.5)
    guest.open(guest.upload(photo))
    assert endless.stopped.wait(20)


def test_what_is_saved_is_what_is_shown(site, guest, small, photo, monkeypatch, tmp_path):
    def downloads(answer):
        """The mask that can be downloaded, if one is shown."""
        updates = [update for update in answer["data"] if "value" in update]
        return updates and np.asarray(
            Image.open(io.BytesIO(httpx.get(updates[0]["value"]["url"]).content))
        )

    (tmp_path / "photo.png").write_bytes(photo)
    picture, _ = visit.open_picture(small, tmp_path / "photo.png")
    expected = [
        visit.full_mask(small, visit.answer(small, Visit(picture, prompts)))
        for prompts in ((Point(50, 30, 1),), (Point(50, 30, 1), Point(20, 9, 0)))
    ]
    assert (expected[0] != expected[1]).any()
    may, full_mask = threading.Event(), visit.full_mask

    def slow(*arguments):
        assert may.wait(20)
        return full_mask(*arguments)

    monkeypatch.setattr(demo, "full_mask", slow)
    guest.send("press", 1, **CLICK)
    guest.join("save")  # waits
    other = Visitor(site)
    other.open(other.upload(photo))
    assert shown(other.send("press", 1, **CLICK))["mask"]  # does not wait
    second = Visitor(site)
    second.session = guest.session  # a click while the mask is made
    guest.join("press", 1, x=20, y=9, right=True)
    may.set()
    with guest.messages() as messages:
        assert len([m for m in messages if m["msg"] == "process_completed"]) == 2
    assert not downloads(guest.send("show_saved"))
    guest.send("save")
    assert np.array_equal(downloads(guest.send("show_saved")), expected[1])
    guest.send("undo")
    assert not downloads(guest.send("show_saved"))
    guest.send("save")
    assert np.array_equal(downloads(guest.send("show_saved")), expected[0])


# What visitors see, of a page with the real weights that a process of its own serves.


@pytest.fixture(scope="module")
def chromium():
    if not find_chromium() and not os.environ.get("CI"):
        pytest.skip("chromium and chromedriver are not installed")


@pytest.fixture(scope="module")
def address(chromium, mobile_sam_file, tmp_path_factory):
    """The page's address."""
    arguments = "--model", str(mobile_sam_file), "--max-megabytes", "2"
    folder = tmp_path_factory.mktemp("server")
    with running_demo(folder, *arguments, stop=signal.SIGTERM) as address:
        yield address


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(chromium, downloads):
    with open_browser(downloads) as browser:
        yield browser


@pytest.fixture(scope="module")
def model(mobile_sam_file):
    """Optimised, since it runs for longer than it compiles."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield from_pretrained(mobile_sam_file)
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def turned(model, downloads):
    """A large photo that a camera took on its side: its path, and the predictor for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(skimage.data.coffee()).resize((3000, 2000), Image.Resampling.BICUBIC)
    photo.save(downloads / "turned.jpg", exif=exif)
    return set_image(model, downloads / "turned.jpg")


@pytest.fixture(scope="module")
def plain(model, downloads):
    Image.fromarray(skimage.data.astronaut()).save(downloads / "plain.jpg")
    return set_image(model, downloads / "plain.jpg")


def set_image(model, path):
    predictor = SamPredictor(model)
    predictor.set_image(path)
    return path, predictor


CUP, FACE = (0.55, 0.3), (0.44, 0.25)


@pytest.fixture(scope="module")
def tabs(browser, address, downloads, turned, plain):
    """Of two visitors: the one chose a file, the other dropped one on the page."""
    first, second = (Page(browser, address, downloads) for _ in range(2))
    first.choose(turned[0])
    second.drop(plain[0])
    for page in (first, second):
        page.front()
        page.find(".stage.open")
    return first, second


@pytest.fixture
def first(tabs):
    """The page with the large photo, without prompts."""
    return cleared(tabs[0])


@pytest.fixture
def second(tabs):
    """The page with the other photo, without prompts."""
    return cleared(tabs[1])


def cleared(page):
    page.front()
    if page.find("#clear").is_enabled():
        page.press("clear")
        page.wait(lambda: page.layer() is None and not page.find("#png").is_enabled())
    return page


def check(page, predictor, *places, candidate=0):
    """The page has the predictor's masks for the prompt, and the prompt is where it was put.

    Returns:
        The mask and the prompt.
    """
    picture, saved = page.saved()
    prompt = saved["prompt"]
    height, width = predictor.original_size
    assert (saved["width"], saved["height"]) == picture.size == (width, height)
    given = [*prompt.get("point_coords", []), *np.reshape(prompt.get("box", []), (-1, 2))]
    pixel = width / page.find(".stage").size["width"]
    assert np.abs(np.array(given) - np.array(places) * (width, height)).max() <= 1 + pixel
    masks, scores, _ = predictor.predict(**prompt)
    chosen = np.argsort(-scores)[candidate]
    assert picture.mode == "1"
    assert np.array_equal(np.asarray(picture), masks[chosen])
    (record,) = saved["masks"]
    assert np.array_equal(pycocotools.mask.decode(record["segmentation"]), masks[chosen])
    assert record["predicted_iou"] == pytest.approx(float(scores[chosen]), abs=1e-5)
    shown = page.layer()
    full = Image.fromarray(masks[chosen]).resize(shown.shape[::-1])
    assert mask_iou(shown[None], np.asarray(full)[None]).min() > 0.98
    return masks[chosen], prompt


def test_pictures_have_their_shape(tabs, turned, plain):
    assert turned[1].original_size == (3000, 2000)
    for page, (_, predictor) in zip(tabs, (turned, plain), strict=True):
        page.front()
        height, width = predictor.original_size
        size = page.find(".stage").size
        assert size["width"] / size["height"] == pytest.approx(width / height, rel=0.01)
        assert not page.find("#png").is_enabled()


def test_two_visitors_click_at_the_same_time(first, second, turned, plain):
    for page, place in ((first, CUP), (second, FACE)):
        page.front()
        page.mouse(place)
    for page, (_, predictor), place in ((first, turned, CUP), (second, plain, FACE)):
        page.front()
        page.finish("")
        _, prompt = check(page, predictor, place)
        assert prompt["point_labels"] == [1]


def test_candidates(first, turned):
    """Three, best first, and round again."""
    page, (_, predictor) = first, turned
    with page.change():
        page.mouse(CUP)
    scores = [float(score) for score in re.findall(r"0\.\d\d", page.find("#candidates").text)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    for candidate in (1, 2, 0):
        with page.change():
            if candidate == 2:
                page.run("document.querySelectorAll('#candidates input')[2].click()")
            else:
                page.press("next")
        check(page, predictor, CUP, candidate=candidate)


def test_points_and_undo(first, turned):
    page, (_, predictor), middle, off = first, turned, (CUP[0], 0.5), (0.9, 0.9)
    with page.change():
        page.mouse(CUP)
    one, _ = check(page, predictor, CUP)
    # Of the background, by the radio and by the right button; back again.
    with page.change():
        page.run("document.querySelectorAll('#label input')[1].click()")
        page.mouse(middle)
    two, prompt = check(page, predictor, CUP, middle)
    assert prompt["point_labels"] == [1, 0]
    assert (one != two).mean() > 0.001
    with page.change():
        page.run("document.querySelectorAll('#label input')[0].click()")
        page.mouse(off, button="context_click")
    _, prompt = check(page, predictor, CUP, middle, off)
    assert prompt["point_labels"] == [1, 0, 0]
    assert len(page.browser.find_elements(By.CSS_SELECTOR, ".points .label0")) == 2
    with page.change():
        page.press("undo")
    assert np.array_equal(check(page, predictor, CUP, middle)[0], two)


def test_a_box(first, turned):
    """From its lower right corner."""
    with first.change():
        first.mouse((0.9, 0.55), (0.5, 0.4), (0.2, 0.1))
    _, prompt = check(first, turned[1], (0.2, 0.1), (0.9, 0.55))
    assert "point_coords" not in prompt


def test_by_keyboard(second):
    page = second
    page.run("document.activeElement.blur()")
    for _ in range(20):
        page.keys(Keys.TAB)
        if "stage" in page.run("return document.activeElement.className"):
            break
    stage = page.find(".stage")
    assert page.run("return document.activeElement == arguments[0]", stage)
    assert stage.get_attribute("role") == "application"
    assert "Arrow keys" in stage.get_attribute("aria-label")
    outline = "return getComputedStyle(arguments[0]).outlineStyle"
    assert page.run(outline, stage) == "solid"
    cross = page.find(".cross")
    assert cross.is_displayed()

    # From the middle (256, 256): steps are of 3 pixels, and of 30.
    far = Keys.SHIFT, *[Keys.ARROW_UP] * 4, Keys.NULL
    page.keys(*far, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_DOWN)
    centre, inside = cross.rect, stage.rect
    assert centre["x"] + 16 == pytest.approx(inside["x"] + 250.5 / 512 * inside["width"], abs=1.5)
    assert centre["y"] + 16 == pytest.approx(inside["y"] + 139.5 / 512 * inside["height"], abs=1.5)
    with page.change():
        page.keys(Keys.ENTER)
    one, saved = page.saved()
    assert saved["prompt"]["point_coords"] == [[250, 139]]
    assert saved["prompt"]["point_labels"] == [1]
    page.run("arguments[0].focus()", stage)
    with page.change():
        page.keys(Keys.ARROW_RIGHT, "B")
    prompt = page.saved()[1]["prompt"]
    assert prompt["point_coords"] == [[250, 139], [253, 139]]
    assert prompt["point_labels"] == [1, 0]
    page.run("arguments[0].focus()", stage)
    with page.change():
        page.keys(Keys.BACKSPACE)
    assert np.array_equal(page.saved()[0], one)
    # Of a box the first corner may be taken back.
    page.run("arguments[0].focus()", stage)
    with page.change():
        page.keys("x", Keys.ESCAPE, *[Keys.ARROW_RIGHT] * 2, "x", *[Keys.ARROW_LEFT] * 9)
        assert page.find(".pending").is_displayed()
        page.keys(Keys.SHIFT, *[Keys.ARROW_UP] * 3, Keys.NULL, "x")
    assert page.saved()[1]["prompt"]["box"] == [232, 49, 259, 139]
    page.keys(Keys.TAB)
    assert not cross.is_displayed()


EVERYTHING = """
import json, sys
from sam_jax import SamAutomaticMaskGenerator, SamPredictor, from_pretrained

file, photo = sys.argv[1:]
model = from_pretrained(file)
predictor = SamPredictor(model)
predictor.set_image(photo)
generator = SamAutomaticMaskGenerator(model, 4, output_mode="coco_rle")
embedding = predictor.get_image_embedding()
print(json.dumps(generator.generate_from_embedding(embedding, predictor.original_size)))
"""


def test_everything(second, mobile_sam_file, plain):
    page, (photo, _) = second, plain
    page.side(4)
    with page.change():
        page.press("all")
    picture, saved = page.saved()
    # Sums are split among cores: a process that may use as many as the server has the same bits.
    command = [sys.executable, "-c", EVERYTHING, str(mobile_sam_file), str(photo)]
    with all_cores():
        run = subprocess.run(command, env=process_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert saved == {"width": 512, "height": 512, "masks": json.loads(run.stdout)}
    assert len(saved["masks"]) >= 3
    masks = [pycocotools.mask.decode(r["segmentation"]) for r in saved["masks"]]
    assert np.array_equal(np.asarray(picture) > 0, np.any(masks, axis=0))
    assert np.array_equal(page.layer(), np.any(masks, axis=0))


def test_another_picture_while_everything_is_looked_for(second, first, turned, plain):
    second.front()
    second.side(8)
    second.press("all")
    second.wait(lambda: second.find("#stage .progress-text").text)
    second.choose(turned[0])
    second.wait(lambda: second.find(".stage").size["width"] < second.find(".stage").size["height"])
    with second.change():
        second.mouse(CUP)
    check(second, turned[1], CUP)
    assert not second.told()
    second.choose(plain[0])
    second.wait(lambda: second.find(".stage").size["width"] == second.find(".stage").size["height"])


def test_refusals(first, address, turned, downloads):
    """What is no picture, or too large, is told, and the picture stays."""
    page, (_, predictor) = first, turned
    with page.change():
        page.mouse(CUP)
    before = page.layer()
    (downloads / "text.jpg").write_text("no picture")
    (downloads / "large.jpg").write_bytes(bytes(2_100_000))
    Image.new("1", (10_000, 6_000)).save(downloads / "many.png")
    for name, message in (
        ("text.jpg", "The file is not a picture of a known format"),
        ("many.png", "The picture has more than 50 million pixels; make it smaller first"),
        ("large.jpg", "exceed the maximum allowed size of 2"),
    ):
        page.choose(downloads / name)
        page.wait(lambda message=message: message in page.told())
    assert np.array_equal(page.layer(), before)
    with pytest.raises(urllib.error.HTTPError) as refused:  # whatever the page allows
        urllib.request.urlopen(upload(address, downloads / "large.jpg"))
    assert refused.value.code == 413
    refused.value.close()
    # Nor does the page serve a site that sends a visitor's browser here.
    foreign = urllib.request.Request(address, headers={"Origin": "http://evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(foreign)
    assert refused.value.code == 403
    refused.value.close()
    with page.change():
        page.mouse((0.9, 0.9))
    check(page, predictor, CUP, (0.9, 0.9))


def test_a_picture_that_was_dropped(browser, site, downloads, plain):
    page = Page(browser, site, downloads)
    page.choose(plain[0])
    page.find(".stage.open")
    for _ in range(3):
        Visitor(site).send("clear")
    page.mouse(FACE)
    page.wait(lambda: "The picture was dropped" in page.told())
    page.find(".stage.empty")
    assert not page.find("#all").is_enabled()
    page.choose(plain[0])
    page.find(".stage.open")
    with page.change():
        page.mouse(FACE)


def test_nothing_comes_from_elsewhere(second, address):
    with second.change():
        second.mouse(FACE)
    names = second.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) > 10
    assert not [name for name in names if not name.startswith((address, "data:", "blob:"))]


def upload(address, path):
    """The request by which a program of its own uploads a file."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.jpg"\r\n\r\n'
    body = head + path.read_bytes() + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return urllib.request.Request(f"{address}gradio_api/upload", body, headers)
