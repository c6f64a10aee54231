"""What a request to upload leaves, with a stand-in for gradio's application."""

import asyncio
import gc
import os
import tempfile

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from sam_jax.demo.upload import UPLOADED, upload_route

NAME = 'Content-Disposition: form-data; name="files"; filename="x.png"'
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture
def nothing_is_left_open():
    """A file that is not closed warns when it is collected, here and not in a later test."""
    yield
    gc.collect()


@pytest.fixture
def names():
    return set()


@pytest.fixture
def application(names, tmp_path, monkeypatch):
    """Takes two files of 2 MB at most, larger than what is kept in memory."""
    (tmp_path / "uploads").mkdir()
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "parts"))
    return Starlette(routes=[upload_route(tmp_path / "uploads", 2_000_000, 2, names)])


@pytest.fixture
def post(application):
    client = TestClient(application)
    return lambda **request: client.post("/gradio_api/upload", **request)


@pytest.fixture
def kept(tmp_path):
    """All files, the first first."""
    return lambda: sorted(
        (path for path in tmp_path.rglob("*") if path.is_file()), key=lambda p: p.stat().st_mtime_ns
    )


def test_a_file_is_its_visitors_alone(post, kept, names):
    """Who send the same may each open and delete theirs."""
    paths = [post(files={"files": ("../photo.png", b"same")}).json() for _ in range(2)]
    assert [[str(path)] for path in kept()] == paths
    assert names == set(map(str, kept()))
    assert kept()[0] != kept()[1]
    assert all(UPLOADED.fullmatch(str(path)) and path.read_bytes() == b"same" for path in kept())


def test_the_latest_stay(post, kept):
    for i in range(4):
        (path,) = post(files={"files": ("photo.png", bytes([i]))}).json()
        os.utime(path, ns=(i, i))  # file systems' clocks are coarse
    assert [path.read_bytes() for path in kept()] == [b"\2", b"\3"]


def test_any_file_of_the_allowed_size(post, kept):
    content = os.urandom(2_000_000)
    assert post(files={"files": ("photo.png", content)}).status_code == 200
    assert kept()[0].read_bytes() == content


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"files": {"files": ("photo.png", bytes(2_000_001))}}, 413),
        ({"files": [("files", ("a.png", b"a")), ("files", ("b.png", b"b"))]}, 400),
        ({"files": {"other": ("photo.png", b"a")}}, 400),
        ({"data": {"files": "text"}}, 400),
        ({"files": {"files": ("a.png", b"a")}, "data": {"more": "text"}}, 400),
        ({"content": b"a"}, 400),
        ({"content": b"--c\r\nno form", "headers": FORM}, 400),
        ({"content": b"a", "headers": {"Content-Type": "multipart/form-data"}}, 400),
    ],
    ids=["large", "two", "other", "text", "more", "no_form", "garbage", "no_boundary"],
)
def test_what_is_refused_leaves_nothing(post, kept, request_, status):
    answer = post(**request_)
    assert answer.status_code == status
    assert answer.text
    assert not kept()


@pytest.mark.usefixtures("nothing_is_left_open")
def test_a_form_without_its_end_leaves_nothing(post, kept):
    content = f"--b\r\n{NAME}\r\n\r\n{'x' * 1_500_000}".encode()
    assert post(content=content, headers=FORM).status_code == 400
    assert not kept()


@pytest.mark.usefixtures("nothing_is_left_open")
def test_who_breaks_off_leaves_nothing(application, kept):
    messages = [
        {"type": "http.request", "body": f"--b\r\n{NAME}\r\n\r\n".encode(), "more_body": True},
        {"type": "http.request", "body": bytes(1_500_000), "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/gradio_api/upload",
        "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
        "query_string": b"",
    }

    async def receive():
        return messages.pop(0)

    async def send(message):
        assert message.get("status") != 200

    asyncio.run(application(scope, receive, send))
    assert not messages
    assert not kept()
