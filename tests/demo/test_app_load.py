"""How the demo's server treats many visitors, slow clients and large uploads, and how it stops."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from visitor import CLICK, JSON, Visitor, launched, raw

from sam_jax.demo import app, session
from sam_jax.demo.limits import Limits

pytestmark = pytest.mark.slow


def test_visitors_are_dropped(small, photo):
    """After a time, or to make room: an idle visitor from the address that has the most."""
    with launched(small, Limits(forget=0.5)) as site:
        guest = Visitor(site)
        guest.open(photo)
        assert "error" not in guest.send("point", **CLICK)
        time.sleep(0.7)
        assert guest.post("undo").status_code == 410
        assert guest.open(photo)["points"] == []
    with launched(small, Limits(visitors=3)) as site:
        alone = Visitor(site, "127.0.0.2")
        alone.open(photo)
        many = [Visitor(site) for _ in range(3)]
        assert [one.post("open", photo).status_code for one in many] == [200, 200, 503]
        [one.open(photo) for one in many[:1]]  # as a new visitor: nothing is free
        assert many[0].session is None
        assert Visitor(site, "127.0.0.2").post("open", photo).status_code == 503
        assert alone.post("undo").status_code == 200
        assert Visitor(site, "127.0.0.3").post("open", photo).status_code == 200
        # Each address has one visitor, so visitors from yet other addresses replace nobody.
        assert Visitor(site, "127.0.0.4").post("open", photo).status_code == 503
        assert alone.post("undo").status_code == 200
    with launched(small, Limits(visitors=3, recent=0)) as site:
        many = [Visitor(site) for _ in range(4)]
        for one in many[:3]:
            one.open(photo)
        many[0].send("undo")
        many[3].open(photo)
        assert [one.post("undo").status_code for one in many] == [200, 410, 200, 200]


def test_one_visitor_cannot_fill_the_queue(small, photo, monkeypatch):
    may, original = threading.Event(), session.predict

    def slow(*arguments):
        assert may.wait(20)
        return original(*arguments)

    with launched(small, Limits(requests=(4, 4, 3))) as site, ThreadPoolExecutor() as threads:
        one, other = Visitor(site), Visitor(site)
        one.open(photo)
        other.open(photo)
        monkeypatch.setattr(app, "predict", slow)
        waiting = [threads.submit(one.post, "point", CLICK) for _ in range(3)]
        time.sleep(0.3)
        answer = one.post("point", CLICK)
        assert (answer.status_code, answer.json()["error"][:16]) == (503, "The page is busy")
        waiting.append(threads.submit(other.post, "point", CLICK))
        time.sleep(0.1)
        assert other.post("undo").status_code == 503  # the limit of all visitors together
        may.set()
        assert [one.result(20).status_code for one in waiting] == [200] * 4
        assert other.post("undo").status_code == 200


def test_one_address_cannot_fill_the_queue(small, photo, monkeypatch):
    """However many visitors it has, and even if it does not finish sending."""
    may, original = threading.Event(), session.predict

    def slow(*arguments):
        assert may.wait(20)
        return original(*arguments)

    limits = Limits(requests=(4, 3, 2), bodies=(8, 3))
    with (
        launched(small, limits) as site,
        ThreadPoolExecutor() as threads,
        contextlib.ExitStack() as stack,
    ):
        many, other = [Visitor(site) for _ in range(4)], Visitor(site, "127.0.0.2")
        for one in (*many, other):
            one.open(photo)
        for one in many[:3]:
            head = f"POST /undo HTTP/1.1\r\nHost: {site.split('/')[2]}\r\nContent-Length: 2\r\n"
            head += f"Content-Type: application/json\r\nX-Session: {one.session}\r\n\r\n"
            stack.enter_context(raw(site, head))
        time.sleep(0.3)
        assert many[3].post("undo").status_code == 503
        assert other.post("undo").status_code == 200
        stack.close()
        time.sleep(0.3)
        monkeypatch.setattr(app, "predict", slow)
        waiting = [threads.submit(one.post, "point", CLICK) for one in many[:3]]
        time.sleep(0.3)
        assert many[3].post("undo").status_code == 503
        waiting.append(threads.submit(other.post, "point", CLICK))
        time.sleep(0.3)
        may.set()
        assert [one.result(20).status_code for one in waiting] == [200] * 4


def test_slow_uploads_end(small, photo):
    """Uploads slower than the limit end, even if data keeps arriving; others do not."""
    limits = Limits(body_seconds=2, body_rate=20_000)
    with launched(small, limits, seconds=0.5) as site:

        def trickle(content, size):
            for i in range(0, len(content), size):
                yield content[i : i + size]
                time.sleep(0.1)

        started = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):  # closed, while it still sends
            assert Visitor(site).post("open", trickle(photo, 200)).status_code == 408
        assert time.monotonic() - started < 8
        assert Visitor(site).post("open", trickle(photo, 2500)).status_code == 200


@pytest.mark.parametrize("work", ["everything", "image", "body"])
def test_stopping_is_quiet(small, photo, endless, monkeypatch, caplog, work):
    """No work in progress delays it or causes messages."""
    running = threading.Event()

    def slow(*_):
        running.set()
        time.sleep(2)
        raise ValueError

    with (
        ThreadPoolExecutor() as threads,
        contextlib.ExitStack() as clients,
        contextlib.ExitStack() as server,
    ):
        site = server.enter_context(launched(small))
        guest = Visitor(site)
        guest.open(photo)
        if work == "everything":
            threads.submit(guest.post, "everything", {"points_per_side": 4})
            assert endless.running.wait(20)
        if work == "image":
            monkeypatch.setattr(app, "open_image_file", slow)
            threads.submit(guest.post, "open", photo)
            assert running.wait(20)
        if work == "body":
            head = f"POST /open HTTP/1.1\r\nHost: {site.split('/')[2]}\r\nContent-Length: 9\r\n"
            head += "Content-Type: application/octet-stream\r\n\r\nabc"
            clients.enter_context(raw(site, head))
            time.sleep(0.3)
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 10
    assert not caplog.records


def test_uploads_in_memory_are_limited(small, photo):
    """Stalled uploads are ended, others continue, and clients that disconnect leave nothing."""
    limits = Limits(uploads=(3, 2), body_seconds=1)
    with launched(small, limits) as site, contextlib.ExitStack() as stack:
        head = f"POST /open HTTP/1.1\r\nHost: {site.split('/')[2]}\r\nContent-Length: 9999\r\n"
        head += "Content-Type: application/octet-stream\r\n\r\nabc"
        with raw(site, head), raw(site, head):
            pass
        time.sleep(0.2)
        slow = [stack.enter_context(raw(site, head)) for _ in range(2)]
        time.sleep(0.2)
        answer = Visitor(site).post("open", photo)
        assert (answer.status_code, answer.json()["error"][:16]) == (503, "The page is busy")
        assert Visitor(site, "127.0.0.2").post("open", photo).status_code == 200
        assert [one.recv(1000).split()[1] for one in slow] == [b"408"] * 2
        assert Visitor(site).post("open", photo).status_code == 200


def test_uploads_of_disconnected_clients_are_dropped(small, photo, monkeypatch):
    """Even while the previous image is still being decoded."""
    running, may, original = threading.Event(), threading.Event(), session.open_image_file

    body = app.Demo.read_body

    class Body(bytes):
        kept = 0

        def __init__(self, _content):
            Body.kept += 1

        def __del__(self):
            Body.kept -= 1

    async def counted(*arguments):
        return Body(await body(*arguments))

    def slow(*arguments):
        running.set()
        assert may.wait(20)
        return original(*arguments)

    monkeypatch.setattr(app.Demo, "read_body", counted)
    monkeypatch.setattr(app, "open_image_file", slow)
    with launched(small) as site, ThreadPoolExecutor() as threads:
        first = threads.submit(Visitor(site).post, "open", photo)
        assert running.wait(20)
        head = f"POST /open HTTP/1.1\r\nHost: {site.split('/')[2]}\r\nContent-Length: 3\r\n"
        head += "Content-Type: application/octet-stream\r\n\r\nabc"
        for _ in range(6):
            with raw(site, head):
                time.sleep(0.1)
        time.sleep(0.3)
        assert Body.kept == 1
        second = threads.submit(Visitor(site).post, "open", photo)
        time.sleep(0.1)
        may.set()
        assert [one.result(20).status_code for one in (first, second)] == [200, 200]


def test_saving_does_not_block_others(small, photo, monkeypatch):
    """Saving does not delay images that others open; each visitor saves one file at a time."""
    running, may, original = threading.Event(), threading.Event(), session.full_mask

    def slow(*arguments):
        running.set()
        assert may.wait(20)
        return original(*arguments)

    monkeypatch.setattr(app, "full_mask", slow)
    with launched(small) as site, ThreadPoolExecutor() as threads:
        guest, other = Visitor(site), Visitor(site)
        for one in (guest, other):
            one.open(photo)
            one.send("point", **CLICK)
        saved = [threads.submit(guest.post, "save.png")]
        assert running.wait(20)
        assert threads.submit(Visitor(site).post, "open", photo).result(10).status_code == 200
        assert guest.post("save.json").status_code == 503
        saved.append(threads.submit(other.post, "save.png"))
        time.sleep(0.1)
        assert guest.send("point", **CLICK)["points"] == [[50, 30, 1]] * 2
        may.set()
        assert [one.result(20).status_code for one in saved] == [200, 200]
        assert guest.post("save.json").status_code == 200


def test_slow_events_end(small, photo):
    with launched(small, Limits(body_seconds=0.3)) as site:
        guest = Visitor(site)
        guest.open(photo)

        def trickle():
            for _ in range(40):
                yield b" "
                time.sleep(0.05)

        started = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):  # closed, while it still sends
            assert guest.post("undo", trickle(), **JSON).status_code == 408
        assert time.monotonic() - started < 10


def test_idle_connections_end(small):
    """Clients that send nothing, half a head, or nothing more are dropped; so are the oldest."""
    with launched(small, seconds=0.5, most=5) as site, contextlib.ExitStack() as stack:
        whole = f"GET / HTTP/1.1\r\nHost: {site.split('/')[2]}\r\n\r\n"
        for text in ("", whole[:20], whole + whole[:20]):
            one = stack.enter_context(raw(site, text))
            started = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                while one.recv(9999):
                    pass
            assert 0.3 < time.monotonic() - started < 5
    with launched(small, most=5) as site, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(raw(site, "")) for _ in range(20)]
        assert httpx.get(site).status_code == 200
        for one in idle[:15]:
            one.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""


def test_unread_answers_end(small):
    with launched(small, seconds=0.5) as site:
        request = f"GET /page.js HTTP/1.1\r\nHost: {site.split('/')[2]}\r\n\r\n"
        with raw(site, "") as one:
            one.settimeout(5)
            with contextlib.suppress(TimeoutError, ConnectionError):
                one.sendall(request.encode() * 20_000)  # answers larger than any buffer
            one.settimeout(60)  # a busy machine ends the connection late
            time.sleep(1)
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := one.recv(2**20):
                    received += len(part)
        assert received < 20_000 * 5000
