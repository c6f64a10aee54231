"""A visitor of the demo page without a browser: the requests that the page's script makes."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import httpx

from sam_jax.demo.app import Demo
from sam_jax.demo.limits import Limits
from sam_jax.demo.server import host_names, running
from sam_jax.predictor import SamPredictor

_USUAL = Limits()
CLICK = {"x": 50, "y": 30, "label": 1}
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def launched(
    model: Any,
    limits: Limits = _USUAL,
    others: tuple = (),
    warm: bool = False,
    **timing: float,
) -> Iterator[str]:
    """Serves a model's page in this process, like `sam-jax demo`, and yields its address.

    Unlike the command, it compiles the model first only if `warm` is true.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        hosts = host_names("0.0.0.0" if others else "127.0.0.1", port, others)
        app = Demo(SamPredictor(model), hosts, limits)
        if warm:
            app.warm_up()
        with running(app, listener, **timing):
            yield f"http://127.0.0.1:{port}/"


@contextlib.contextmanager
def raw(site, text, source="127.0.0.1"):
    """A connection to the site, on which the text was sent."""
    where = "127.0.0.1", int(site.split(":")[2].strip("/"))
    with socket.create_connection(where, 20, source_address=(source, 0)) as connection:
        connection.sendall(text.encode())
        yield connection


class Visitor:
    """A tab of a browser; `source` is its machine's address."""

    def __init__(self, address: str, source: str = "127.0.0.1"):
        self.address, self.source, self.session = address, source, None

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """Posts bytes, chunks of bytes, or JSON."""
        kind = {"content": body} if body is not None else {"json": {}}
        if isinstance(body, dict):
            kind = {"json": body}
        if self.session:
            headers = {"X-Session": self.session, **headers}
        if "content" in kind:
            headers = {"Content-Type": "application/octet-stream", **headers}
        transport = httpx.HTTPTransport(local_address=self.source)
        with httpx.Client(base_url=self.address, timeout=600, transport=transport) as client:
            return client.post(path, headers=headers, **kind)

    def open(self, content: Any) -> dict:
        """Uploads a file; returns the server's answer."""
        answer = self.post("open", content).json()
        self.session = answer.get("session", self.session)
        return answer

    def send(self, name: str, **numbers: Any) -> dict:
        """Sends an event; returns the server's answer."""
        return self.post(name, numbers).json()
