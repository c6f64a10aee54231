"""What the demo's server refuses before gradio sees it: requests that its page never makes.

Other web sites' (a browser sends them to this machine on behalf of any site, also under a name of
that site), bodies beyond the size of a picture, and what of gradio's is of no use here: files that
were not uploaded, which it would fetch from elsewhere, and folders, at which its cleaning ends.
"""

import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from sam_jax.demo.upload import UPLOADED

_UNUSED = ("/process_recording", "/component_server", "/deep_link", "/file=http")
_SPARE = 64 * 1024


class Guard:
    """Around an ASGI application.

    Args:
        app: the application.
        names: the host names that requests may be for; None for any.
        max_bytes: of a request, beside a few.
    """

    def __init__(self, app: Callable, names: Collection[str] | None, max_bytes: int):
        self.app, self.names, self.max_bytes = app, names, max_bytes + _SPARE

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Passes a request on or answers it."""
        if scope["type"] == "http":
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            if status := self._refusal(scope["path"], headers):
                return await _answer(send, status)
            receive = _bounded(receive, self.max_bytes)
            kind = headers.get("content-type", "")
            # All but uploads are read as JSON, whatever they are called: gradio may as well.
            if scope["method"] == "POST" and not kind.startswith("multipart/form-data"):
                body = await _read(receive)
                if body is None:
                    return await _answer(send, 413)
                if _names_other_files(body):
                    return await _answer(send, 403)
                receive = _again(body, receive)
        return await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: dict[str, str]) -> int | None:
        """An HTTP status, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.names is not None and urlsplit(f"//{host}").hostname not in self.names:
            return 403
        if origin is not None and urlsplit(origin).netloc != host:
            return 403
        if any(unused in path for unused in _UNUSED):
            return 404
        length = headers.get("content-length", "0")
        return 413 if not length.isdigit() or int(length) > self.max_bytes else None


def _names_other_files(body: bytes) -> bool:
    """Whether JSON names a file that was not uploaded."""

    def names(value: Any) -> bool:
        if isinstance(value, dict):
            other = "path" in value and not UPLOADED.fullmatch(str(value["path"]))
            return other or any(map(names, value.values()))
        return isinstance(value, list) and any(map(names, value))

    try:
        return bool(body) and names(json.loads(body))
    except (ValueError, RecursionError):
        return True


def _bounded(receive: Callable, limit: int) -> Callable[[], Awaitable[dict]]:
    """`receive`, which takes whoever sends more for gone."""
    received = 0

    async def bounded() -> dict:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return message if received <= limit else {"type": "http.disconnect"}

    return bounded


async def _read(receive: Callable) -> bytes | None:
    """The whole body, None if it does not come to its end."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _again(body: bytes, receive: Callable) -> Callable[[], Awaitable[dict]]:
    """A `receive` that first gives a body that was read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict:
        return messages.pop() if messages else await receive()

    return again


async def _answer(send: Callable, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})
