"""What the demo's server refuses, with a stand-in for gradio's application."""

import json

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.testclient import TestClient

from sam_jax.demo.guard import Guard


async def application(request):
    return Response(await request.body())


def client(names=("127.0.0.1", "localhost")):
    app = Starlette()
    app.add_route("/{path:path}", application, methods=["GET", "POST"])
    return TestClient(Guard(app, names, 1000), base_url="http://127.0.0.1:7860")


JSON = {"Content-Type": "application/json"}


def post(body, headers=JSON, **options):
    return client(**options).post("/gradio_api/queue/join", content=body, headers=headers)


def test_what_the_page_sends_goes_through():
    file = {"path": f"/tmp/a/{'0a' * 32}", "url": "http://127.0.0.1:7860/x"}
    body = json.dumps({"data": [file, 1]})
    answer = post(body, {**JSON, "Origin": "http://127.0.0.1:7860"})
    assert answer.status_code == 200
    assert answer.text == body
    assert client().get("/", headers={**JSON, "Host": "localhost:7860"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:7860"},
        {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "null"},
        {"Host": ""},
    ],
    ids=str,
)
def test_other_sites_are_refused(headers):
    assert post("{}", {**JSON, **headers}).status_code == 403


def test_another_name_is_fine_where_other_machines_are_served():
    headers = {**JSON, "Host": "host.example", "Origin": "http://host.example"}
    assert post("{}", headers, names=None).status_code == 200
    headers["Origin"] = "http://evil.example"
    assert post("{}", headers, names=None).status_code == 403


@pytest.mark.parametrize(
    "body",
    [
        '{"data": [{"path": "https://evil.example/huge", "meta": {"_type": "gradio.FileData"}}]}',
        '{"data": [[{"path": " \\u0068TTP://evil.example/huge"}]]}',
        '{"data": [{"path": "/etc/passwd"}]}',
        '{"data": [{"path": "/tmp/sam_jax_demo_x/uploads"}]}',
        '{"data": [{"path": ["/etc/passwd"]}]}',
        '{"event_data": {"path": null}}',
        "no JSON",
        "[" * 100_000,
    ],
    ids=["address", "escaped", "file", "folder", "list", "null", "text", "deep"],
)
@pytest.mark.parametrize("kind", [JSON, {"Content-Type": "application/x+json"}, {}], ids=str)
def test_only_uploads_are_opened(body, kind):
    assert post(body, kind).status_code in (403, 413)


@pytest.mark.parametrize(
    "path", ["process_recording", "component_server", "deep_link", "file=https://evil.example"]
)
def test_what_the_page_does_not_use_is_not_there(path):
    assert client().get(f"/gradio_api/{path}").status_code == 404


def test_large_bodies_are_refused():
    large = b"x" * (1000 + 64 * 1024 + 1)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client().post("/upload", content=large, headers=form).status_code == 413
    assert client().post("/upload", content=large[:-1], headers=form).content == large[:-1]

    def chunks():
        yield from (large, b"x")

    # Without a length: the application sees a visitor who left.
    assert post(chunks()).status_code == 413
    with pytest.raises(ClientDisconnect):
        client().post("/upload", content=chunks(), headers=form)
