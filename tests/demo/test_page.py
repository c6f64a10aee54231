"""The demo page in headless Chromium, with the real weights, as a visitor uses it."""

import os
import re
import socket
import sys
import urllib.error
import urllib.request

import numpy as np
import pycocotools.mask
import pytest
import skimage.data
from browser import Page, find_chromium, open_browser, running_demo
from PIL import Image
from reference import mask_iou
from selenium.webdriver.common.by import By

from sam_jax import SamAutomaticMaskGenerator, SamPredictor, cli, from_pretrained


@pytest.fixture
def server(mobile_sam_file, tmp_path):
    """The page's address."""
    if not find_chromium() and not os.environ.get("CI"):
        pytest.skip("chromium and chromedriver are not installed")
    (tmp_path / "server").mkdir()
    arguments = "--model", str(mobile_sam_file), "--max-megabytes", "2"
    with running_demo(tmp_path / "server", *arguments) as address:
        yield address


@pytest.fixture
def browser(server, tmp_path):
    with open_browser(tmp_path) as browser:
        yield browser


def test_page(server, browser, mobile_sam_file, tmp_path):
    # A large photo that a camera took on its side; the other is dropped on the page.
    turned, plain = tmp_path / "turned.jpg", tmp_path / "plain.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    coffee = Image.fromarray(skimage.data.coffee()).resize((3000, 2000), Image.Resampling.BICUBIC)
    coffee.save(turned, exif=exif)
    Image.fromarray(skimage.data.astronaut()).save(plain)
    model = from_pretrained(mobile_sam_file)
    predictors = {}
    for path in (turned, plain):
        predictors[path] = SamPredictor(model)
        predictors[path].set_image(path)
    assert predictors[turned].original_size == (3000, 2000)

    first, second = (Page(browser, server, tmp_path) for _ in range(2))
    first.front()
    first.find("input[type=file]").send_keys(str(turned))
    first.find(".stage.open")
    second.drop(plain)
    for page, path in ((first, turned), (second, plain)):
        page.front()
        page.find(".stage.open")
        height, width = predictors[path].original_size
        size = page.find(".stage").size
        assert size["width"] / size["height"] == pytest.approx(width / height, rel=0.01)
        assert not page.find("#png").is_enabled()

    def check(page, path, *places, candidate=0):
        """The page has the predictor's masks for the prompt, and the prompt is where it was put."""
        picture, saved = page.saved()
        predictor, prompt = predictors[path], saved["prompt"]
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

    # Two visitors click at the same time.
    cup, face = (0.55, 0.3), (0.44, 0.25)
    first.front()
    first.mouse(cup)
    second.front()
    second.mouse(face)
    for page in (first, second):
        page.front()
        page.finish("")
    one, prompt = check(first, turned, cup)
    assert prompt["point_labels"] == [1]
    check(second, plain, face)

    # The three candidates, best first, and round again.
    radios = first.find("#candidates").text
    first.front()
    scores = [float(score) for score in re.findall(r"0\.\d\d", first.find("#candidates").text)]
    assert len(scores) == 3, radios
    assert scores == sorted(scores, reverse=True)
    for candidate in (1, 2, 0):
        with first.change():
            first.press("next")
        check(first, turned, cup, candidate=candidate)

    # A point of the background, by the radio and by the right button; back again.
    off = (0.9, 0.9)
    with first.change():
        first.run("document.querySelectorAll('#label input')[1].click()")
        first.mouse((cup[0], 0.5))
    two, prompt = check(first, turned, cup, (cup[0], 0.5))
    assert prompt["point_labels"] == [1, 0]
    assert (one != two).mean() > 0.001
    with first.change():
        first.run("document.querySelectorAll('#label input')[0].click()")
        first.mouse(off, button="context_click")
    _, prompt = check(first, turned, cup, (cup[0], 0.5), off)
    assert prompt["point_labels"] == [1, 0, 0]
    assert len(first.browser.find_elements(By.CSS_SELECTOR, ".points .label0")) == 2
    with first.change():
        first.press("undo")
    assert np.array_equal(check(first, turned, cup, (cup[0], 0.5))[0], two)

    # A box, from its lower right corner.
    first.press("clear")
    first.wait(lambda: first.layer() is None and not first.find("#png").is_enabled())
    with first.change():
        first.mouse((0.9, 0.55), (0.5, 0.4), (0.2, 0.1))
    _, prompt = check(first, turned, (0.2, 0.1), (0.9, 0.55))
    assert "point_coords" not in prompt

    # The other visitor's page is as it was, and everything there is found.
    check(second, plain, face)
    second.front()
    slider = "const side = document.querySelector('#side input'); side.value = 4;"
    second.run(slider + "side.dispatchEvent(new Event('input', {bubbles: true}))")
    with second.change():
        second.press("all")
    picture, saved = second.saved()
    generator = SamAutomaticMaskGenerator(model, 4, output_mode="coco_rle")
    embedding = predictors[plain].get_image_embedding()
    records = generator.generate_from_embedding(embedding, (512, 512))
    assert saved == {"width": 512, "height": 512, "masks": records}
    assert len(saved["masks"]) >= 3
    masks = [pycocotools.mask.decode(r["segmentation"]) for r in saved["masks"]]
    assert np.array_equal(np.asarray(picture) > 0, np.any(masks, axis=0))
    assert np.array_equal(second.layer(), np.any(masks, axis=0))

    # What is no picture, or too large, is told, and the picture stays.
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "large.jpg").write_bytes(bytes(2_100_000))
    Image.new("1", (10_000, 6_000)).save(tmp_path / "many.png")
    for name, message in (
        ("text.jpg", "The file is not a picture of a known format"),
        ("many.png", "The picture has more than 50 million pixels; make it smaller first"),
        ("large.jpg", "exceed the maximum allowed size of 2"),
    ):
        second.find("input[type=file]").send_keys(str(tmp_path / name))
        second.wait(lambda message=message: message in second.find(".toast-body").text)
    assert np.array_equal(second.layer(), np.any(masks, axis=0))
    with pytest.raises(urllib.error.HTTPError) as refused:  # whatever the page allows
        urllib.request.urlopen(upload(server, tmp_path / "large.jpg"))
    assert refused.value.code == 413
    refused.value.close()
    # Nor does the page serve a site that sends a visitor's browser here.
    foreign = urllib.request.Request(server, headers={"Origin": "http://evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(foreign)
    assert refused.value.code == 403
    refused.value.close()
    with second.change():
        second.mouse(face)
    check(second, plain, face)

    # Nothing came from elsewhere.
    names = second.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) > 10
    assert not [name for name in names if not name.startswith((server, "data:", "blob:"))]


def upload(server, path):
    """The request by which a program of its own uploads a file."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.jpg"\r\n\r\n'
    body = head + path.read_bytes() + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return urllib.request.Request(f"{server}gradio_api/upload", body, headers)


@pytest.fixture
def fails(monkeypatch):
    """Runs `sam-jax demo ARGUMENTS`, which must fail; what it says."""

    def fails(*arguments):
        monkeypatch.setattr(sys, "argv", ["sam-jax", "demo", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return exit_info.value.code

    return fails


@pytest.mark.parametrize(
    ("host", "warns"),
    [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)],
)
def test_other_hosts_are_warned_of(fails, capsys, host, warns):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert "/no/such/model" in fails("--host", host, "--port", port, "--model", "/no/such/model")
    printed = capsys.readouterr().err
    assert bool(printed) == warns
    assert not warns or f"warning: whoever reaches port {port} of this machine can" in printed


def test_what_cannot_be_served(fails):
    """Told before the model is loaded."""
    message = fails("--max-megabytes", "0", "--model", "/no/such/model")
    assert message == "sam-jax: --max-megabytes is 0, expected 1 or more"
    assert fails("--port", "0") == "sam-jax: --port is 0, expected 1 to 65535"
    for host in ("", "::1"):
        message = fails("--host", host)
        assert message == f"sam-jax: --host is {host!r}, expected a name or an IPv4 address"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Address already in use" in fails("--port", port, "--model", "/no/such/model")


def test_without_gradio(fails, monkeypatch):
    monkeypatch.delitem(sys.modules, "sam_jax.demo.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert fails() == "sam-jax: gradio is not installed; install sam_jax with its extra `demo`"
