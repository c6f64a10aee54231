"""The answers and errors of the demo's server with a small model, over the network."""

import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from visitor import CLICK, JSON, Visitor, launched, raw

from sam_jax import SamPredictor
from sam_jax.demo import app, session
from sam_jax.demo.server import host_names
from sam_jax.demo.session import Found, Session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(small):
    with launched(small, others=("proxy.example:80",)) as address:
        yield address


def test_an_image_waits_until_the_encoder_is_compiled(small, photo, monkeypatch):
    """The page is served earlier, while the programs that visitors need next are compiled."""
    order = []

    def compile_slowly(_):
        time.sleep(0.5)
        order.append("compiled")

    monkeypatch.setattr(app, "embed_blank", compile_slowly)
    with launched(small, warm=True) as site:
        guest = Visitor(site)
        guest.open(photo)
        order.append("opened")
        assert "error" not in guest.send("point", **CLICK)
    assert order == ["compiled", "opened"]


@pytest.fixture
def guest(site, photo, caplog):
    """A visitor who has opened an image. No request may log an error."""
    guest = Visitor(site)
    assert guest.open(photo)["width"] == 113
    yield guest
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        *(("GET", f"/{name}", 200) for name in ("page.js", "stage.js", "page.css", "stage.css")),
        ("POST", "/", 405),
        ("OPTIONS", "/open", 405),
        ("GET", "/open", 405),
        ("PUT", "/point", 405),
        ("GET", "/page.js/", 404),
        ("GET", "/app.py", 404),
        ("GET", "/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/file=CANARY", 404),
        ("GET", "/gradio_api/file/CANARY", 404),
        ("POST", "/gradio_api/run/point", 404),
        ("POST", "/open?y=/" + "0" * 64 + "&x=CANARY", 415),
    ],
)
def test_routes(site, method, path, status):
    """Other routes do not exist, and the server never fetches anything."""
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.05)
        where = f"http://127.0.0.1:{canary.getsockname()[1]}/x"
        answer = httpx.request(method, site + path[1:].replace("CANARY", where))
        with pytest.raises(TimeoutError):
            canary.accept()
    assert answer.status_code == status
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "LOCALHOST:PORT", "Origin": "http://localhost:PORT"}, 200),
        ({"Host": "proxy.example:80"}, 200),
        ({"Host": "proxy.example"}, 200),
        ({"Host": f"{socket.gethostname()}:PORT"}, 200),
        ({"Host": "localhost"}, 403),
        ({"Host": "localhost:1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "evil.example:PORT"}, 403),
        ({"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT"}, 403),
        ({"Host": "evil.example@localhost:PORT"}, 403),
        ({"Host": "localhost:PORT.evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "https://127.0.0.1:PORT"}, 403),
        ({"Origin": "http://127.0.0.1:8000"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_other_sites_are_refused(site, headers, status):
    """Even if all of a machine's addresses are served: another site's name may point to them."""
    port = site.split(":")[2].strip("/")
    headers = {name: value.replace("PORT", port) for name, value in headers.items()}
    assert httpx.get(site, headers=headers).status_code == status


def test_a_local_server_has_no_other_names():
    assert host_names("127.0.0.1", 80) == {
        *("127.0.0.1", "127.0.0.1:80", "localhost", "localhost:80")
    }


@pytest.mark.parametrize("name", ["Host", "Origin", "Content-Type", "X-Session", "Content-Length"])
def test_headers_are_single(site, guest, name):
    values = {"Host": site.split("/")[2], "Content-Type": "application/json", "X-Session": "a"}
    headers = {**values, "Origin": site.strip("/"), "Content-Length": "2"}
    head = "".join(f"{k}: {v}\r\n" for k, v in (*headers.items(), (name, headers[name])))
    with raw(site, f"POST /undo HTTP/1.1\r\n{head}\r\n{{}}") as connection:
        # uvicorn's parser merges equal lengths, as RFC 9110 allows.
        expected = b"410" if name == "Content-Length" else b"400"
        assert connection.recv(100).split()[1] == expected


@pytest.mark.parametrize(
    ("name", "event", "error"),
    [
        ("point", {**CLICK, "x": "7"}, "X is '7', expected a whole number from "),
        ("point", {**CLICK, "x": 7.0}, "X is 7.0, expected"),
        ("point", {**CLICK, "x": True}, "X is True, expected"),
        ("point", {**CLICK, "x": -(10**400)}, "X is -1000"),
        ("point", {**CLICK, "x": [1] * 1000}, "X is [1, 1, 1, 1, 1, 1, ...], expected"),
        ("point", {**CLICK, "label": 2}, "Label is 2, expected a whole number from 0 to 1"),
        ("point", {"x": 1, "y": 1}, "The request is {'x': 1, 'y': 1}, expected x and y and label"),
        ("point", {**CLICK, "path": "/etc/passwd"}, "The request is {"),
        ("point", b"[1]", "The request is [1], expected"),
        ("point", b'{"x": NaN, "y": 1, "label": 1}', "X is nan, expected"),
        ("point", b'{"x": "\\ud800", "y": 1, "label": 1}', "X is '\\ud800', expected"),
        ("point", b'{"\xed\xa0\x80": 1}', "The request is {'\\ud800': 1}, expected"),
        ("point", b"[" * 50_000, "The JSON text is nested 50000 levels deep, expected at most 100"),
        ("point", b"no JSON", "The JSON text is not JSON"),
        ("point", b"", "The JSON text is not JSON"),
        ("point", b" " * 65537, "Expected at most 65536 bytes"),
        ("point", iter([b" " * 65536, b" "]), "Expected at most 65536 bytes"),
        ("box", {"x0": 1, "y0": 1, "x1": 9}, "The request is {"),
        ("choose", {"candidate": 3}, "Candidate is 3, expected a whole number from 0 to 2"),
        ("everything", {"points_per_side": 10**6}, "is 1000000, expected a whole number from 4"),
        ("save.png", {}, "There is no mask to save"),
        ("open", b"not an image", "The file is not an image of a known format"),
        ("open", bytes(20_000_001), "Expected at most 20000000 bytes"),
        ("open", iter([bytes(10_000_000)] * 3), "Expected at most 20000000 bytes"),
    ],
)
def test_bad_events_are_refused(guest, name, event, error):
    kind = {} if name == "open" else JSON
    answer = guest.post(name, event, **kind)
    assert answer.status_code in (400, 413)
    assert error in answer.json()["error"]
    assert guest.send("undo")["points"] == []  # the session is unchanged


def test_wrong_content_types_are_refused(guest, photo):
    assert guest.post("point", b"{}", **{"Content-Type": "text/plain"}).status_code == 415
    form = "multipart/form-data; boundary=x"
    assert guest.post("open", photo, **{"Content-Type": form}).status_code == 415


@pytest.mark.parametrize("token", ["", "a", "a" * 43, "a" * 42 + "\xff", "../" * 14 + "a"])
def test_unknown_visitors_have_no_image(site, token):
    headers = [*JSON.items(), (b"X-Session", token.encode("latin-1"))]
    answer = httpx.post(f"{site}undo", content=b"{}", headers=headers)
    assert answer.status_code == 410
    assert answer.json()["error"].startswith("The image was removed")


def test_clicks_far_outside_are_moved_to_the_edge(guest):
    shown = guest.send("point", x=10**9, y=-(10**9), label=0)
    assert shown["points"] == [[112, 0, 0]]
    assert shown["mask"].startswith("data:image/png;base64,")


def test_saved_files_match_the_page(small, guest, photo):
    image, _ = session.open_image_file(SamPredictor(small), photo)
    expected = Session(image)
    for x in (50, 20, 70):
        expected = session.predict(small, session.add_point(expected, x, 9, 1))
        shown = guest.send("point", x=x, y=9, label=1)
    assert shown["scores"] == expected.prediction.scores.tolist()
    shown, expected = guest.send("undo"), session.predict(small, session.undo(expected))
    assert shown["points"] == [[50, 9, 1], [20, 9, 1]]
    assert shown["scores"] == expected.prediction.scores.tolist()
    mask = session.full_mask(small, expected)
    file = guest.post("save.png").content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), mask)
    assert guest.post("save.json").json() == session.prompt_json(expected, mask)
    guest.send("clear")
    assert guest.send("save.json")["error"] == "There is no mask to save"


def test_everything(small, guest, photo, monkeypatch):
    mask = np.zeros((71, 113), bool)
    mask[9:30, 9:30] = True
    record = {
        "segmentation": session.rle_compress(session.rle_encode(mask)),
        "area": int(mask.sum()),
    }
    monkeypatch.setattr(app, "find_everything", lambda model, image, *_: Found(image, [record]))
    guest.send("point", **CLICK)
    shown = guest.send("everything", points_per_side=4)
    assert shown["found"]
    assert shown["points"] == []
    assert shown["mask"].startswith("data:image/png;base64,")
    saved = Image.open(io.BytesIO(guest.post("save.png").content))
    assert np.array_equal(np.asarray(saved), mask)
    assert guest.send("save.json") == {"width": 113, "height": 71, "masks": [record]}
    assert not guest.send("clear")["found"]


@pytest.mark.parametrize("how", ["open", "point", "everything", "end"])
def test_everything_ends(small, photo, endless, how):
    with ThreadPoolExecutor() as threads, launched(small) as site:
        guest, other = Visitor(site), Visitor(site)
        for one in (other, guest):
            one.open(photo)
        answer = threads.submit(guest.post, "everything", {"points_per_side": 4})
        assert endless.running.wait(20)
        assert guest.post("progress").json() == [3, 1000]
        other.send("point", **CLICK)
        assert not endless.stopped.wait(0.1)
        if how == "open":
            guest.open(photo)
        if how == "point":
            guest.send("point", **CLICK)
        if how == "everything":
            threads.submit(guest.post, "everything", {"points_per_side": 8})
        if how != "end":
            assert answer.result(20).json() == {"error": "Everything mode was stopped"}
    assert endless.stopped.wait(20)


def test_everything_ends_with_its_visitor(site, guest, endless):
    body = json.dumps({"points_per_side": 8})
    head = f"Host: {site.split('/')[2]}\r\nX-Session: {guest.session}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with raw(site, f"POST /everything HTTP/1.1\r\n{head}{body}"):
        assert endless.running.wait(20)
        assert not endless.stopped.wait(0.2)
    assert endless.stopped.wait(20)


def test_clicks_come_first(site, guest, photo, endless, monkeypatch):
    """Everything mode pauses while others click."""
    other, may, original = Visitor(site), threading.Event(), session.predict
    other.open(photo)

    def slow(*arguments):
        assert may.wait(20)
        return original(*arguments)

    monkeypatch.setattr(app, "predict", slow)
    with ThreadPoolExecutor() as threads:
        everything = threads.submit(guest.post, "everything", {"points_per_side": 4})
        assert endless.running.wait(20)
        click = threads.submit(other.send, "point", **CLICK)
        time.sleep(0.3)
        steps = endless.steps
        time.sleep(0.2)
        assert endless.steps == steps
        may.set()
        assert click.result(20)["points"] == [[50, 30, 1]]
        time.sleep(0.2)
        assert endless.steps > steps
        guest.send("undo")
        everything.result(20)


def test_images_are_decoded_one_at_a_time(site, guest, photo, monkeypatch):
    """Clicks of other visitors do not wait for them."""
    may, original, most, now = threading.Event(), session.open_image_file, [0], [0]

    def slow(*arguments):
        now[0] += 1
        most[0] = max(most[0], now[0])
        assert may.wait(20)
        now[0] -= 1
        return original(*arguments)

    monkeypatch.setattr(app, "open_image_file", slow)
    with ThreadPoolExecutor() as threads:
        opened = [threads.submit(Visitor(site).open, photo) for _ in range(3)]
        assert guest.send("point", **CLICK)["points"] == [[50, 30, 1]]
        may.set()
        assert all("session" in one.result(20) for one in opened)
    assert most == [1]


def test_failures_reveal_no_details(small, photo, monkeypatch, caplog):
    with launched(small) as site:
        guest = Visitor(site)
        guest.open(photo)
        monkeypatch.setattr(app, "predict", lambda *_: {}["secret"])
        answer = guest.post("point", CLICK)
        assert (answer.status_code, "secret" in answer.text) == (500, False)
        monkeypatch.undo()
        assert guest.send("point", **CLICK)["points"] == [[50, 30, 1]]
    assert "KeyError: 'secret'" in caplog.text
