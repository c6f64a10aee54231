"""The demo page as an ASGI application: a few routes, each with its limits.

Clients cannot name files or addresses, and the server fetches nothing. An image is kept in memory
until it is embedded. A random token identifies its visitor.
"""

import asyncio
import base64
import contextlib
import io
import json
import re
import reprlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from sam_jax.demo.limits import BUSY, Limits, Shares, Turns, Visitor, Worker
from sam_jax.demo.session import (
    EmbeddedImage,
    Found,
    Session,
    add_box,
    add_point,
    blank_sessions,
    choose,
    clear,
    draw_layer,
    embed_blank,
    everything_json,
    find_everything,
    full_mask,
    label_image,
    number_masks,
    open_image_file,
    predict,
    prompt_json,
    undo,
)
from sam_jax.files import read_json
from sam_jax.predictor import SamPredictor

POINTS_PER_SIDE: tuple[int, int] = 4, 32  # limits for everything mode
_PIXELS = -(10**9), 10**9  # points outside the image are moved to its edge
# The functions that change a session, and the integers that they take, each with its limits.
_CHANGES: dict[str, tuple[Callable[..., Session], dict[str, tuple[int, int]]]] = {
    "point": (add_point, {"x": _PIXELS, "y": _PIXELS, "label": (0, 1)}),
    "box": (add_box, dict.fromkeys(("x0", "y0", "x1", "y1"), _PIXELS)),
    "choose": (choose, {"candidate": (0, 2)}),
    "undo": (undo, {}),
    "clear": (clear, {}),
}

_FILES = {
    "/": ("page.html", "text/html"),
    **{f"/{name}": (name, "text/javascript") for name in ("page.js", "stage.js")},
    **{f"/{name}": (name, "text/css") for name in ("page.css", "stage.css")},
}

_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# Headers that servers and proxies may read differently if they are repeated.
_SINGLE = (b"host", b"origin", b"content-type", b"content-length", b"x-session")
_SAVED = {"png": "image/png", "json": "application/json"}
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_GONE = "the image was removed, after a long time or to make room for others; open it again"


class Demo:
    """The application that serves the page.

    Args:
        predictor: embeds all visitors' images; its model predicts their masks.
        hosts: accepted values of the Host header, such as "localhost:7860", in addition to the
            address of the connection.
        limits: see `Limits`.
    """

    def __init__(self, predictor: SamPredictor, hosts: set[str], limits: Limits):
        self.predictor, self.model = predictor, predictor.model
        self.hosts, self.limits = hosts, limits
        self.visitors: dict[str, Visitor] = {}
        self._turns = Turns()
        self._bodies, self._requests = Shares(*limits.bodies), Shares(*limits.requests)
        self._uploads, self._saves = Shares(*limits.uploads), Shares(*limits.saves)
        # One piece of work of each kind at a time; kinds do not wait for each other.
        self._workers = [Worker() for _ in range(4)]
        self._clicks, self._images, self._files, self._finder = self._workers
        routes = [
            Route("/open", self._open, methods=["POST"]),
            *(Route(f"/{n}", self._change(*c), methods=["POST"]) for n, c in _CHANGES.items()),
            Route("/everything", self._everything, methods=["POST"]),
            Route("/progress", self._progress, methods=["POST"]),
            *(Route(f"/save.{kind}", self._save(kind), methods=["POST"]) for kind in _SAVED),
            *(Route(path, _file(*file, limits), methods=["GET"]) for path, file in _FILES.items()),
        ]
        handlers = {HTTPException: _tell, ClientDisconnect: _tell_nobody, Exception: _tell_failure}
        self._app = Starlette(routes=routes, exception_handlers=handlers)
        self._app.router.redirect_slashes = False

    def warm_up(self) -> list[Future]:
        """Begins to compile what visitors need, in the order in which they need it.

        Requests for an image and a first click wait for it, and so does everything mode. Call this
        before the page is served.
        """
        first, *others = blank_sessions(self.model.config)
        begun = [
            self._images.first(embed_blank, self.predictor),
            self._clicks.first(predict, self.model, first),
        ]
        self._finder.first(wait, begun)
        begun += [self._finder.first(predict, self.model, session) for session in others]
        return [*begun, self._finder.first(find_everything, self.model, first.image, 1)]

    def close(self) -> None:
        """Ends the work of all threads."""
        for token in list(self.visitors):
            self._drop(token)
        for worker in self._workers:
            worker.close()

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answers a request, or rejects it because of its headers."""

        async def send_securely(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(k.encode(), v.encode()) for k, v in _SECURITY.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if scope["type"] != "http":
            raise ValueError(f"the page has no {scope['type']}")
        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_securely)

    def _refusal(self, scope: dict[str, Any]) -> Response | None:
        """The error response for requests that may come from other sites or misread headers."""
        count = Counter(name for name, _ in scope["headers"])
        if twice := [name.decode() for name in _SINGLE if count[name] > 1]:
            return _error(400, f"the header {twice[0]} is repeated, expected one")
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, (address, port) = headers.get(b"host", "").lower(), scope["server"]
        if host not in self.hosts and host != f"{address}:{port}":
            return _error(403, f"unknown host {host!r}; start the page with --allow-host for it")
        if headers.get(b"origin", f"http://{host}") != f"http://{host}":
            return _error(403, "the request comes from another site")
        return None

    def _visitor(self, token: str) -> Visitor:
        self._forget()
        if not _TOKEN.fullmatch(token) or token not in self.visitors:
            raise HTTPException(410, _GONE)
        return self.visitors[token]

    @contextlib.asynccontextmanager
    async def _visiting(
        self, request: Request, limits: dict[str, tuple[int, int]]
    ) -> AsyncIterator[tuple[Visitor, dict[str, int]]]:
        """The visitor who sent the request, and the request's numbers."""
        token, address = request.headers.get("x-session", ""), request.scope["client"][0]
        self._visitor(token)
        # A body that is still arriving does not take a share of the work.
        with self._bodies.take(address):
            numbers = await self._numbers(request, limits)
        with self._requests.take(address, token):
            visitor = self._visitor(token)
            visitor.used = time.monotonic()
            yield visitor, numbers

    def _forget(self) -> None:
        oldest = time.monotonic() - self.limits.forget
        for token in [token for token, v in self.visitors.items() if v.used < oldest]:
            self._drop(token)

    def _drop(self, token: str) -> None:
        self.visitors.pop(token).stop.set()

    def _make_room(self, address: str) -> None:
        """Drops the visitor idle the longest, of those at the address with the most visitors.

        The newcomer is rejected instead if that visitor was active recently and its address would
        not have more visitors than the newcomer's.
        """
        if len(self.visitors) < self.limits.visitors:
            return
        count = Counter(visitor.address for visitor in self.visitors.values())
        most = max(count.values())
        crowded = [token for token, v in self.visitors.items() if count[v.address] == most]
        token = min(crowded, key=lambda token: self.visitors[token].used)
        idle = time.monotonic() - self.visitors[token].used
        if most <= count[address] + 1 and idle < self.limits.recent:
            raise HTTPException(503, BUSY)
        self._drop(token)

    async def read_body(self, request: Request, kind: str, most: int) -> bytes:
        """The whole body, if it has at most `most` bytes and arrives fast enough."""
        if request.headers.get("content-type") != kind:
            raise HTTPException(415, f"expected the Content-Type {kind}")
        too_large = HTTPException(413, f"expected at most {most} bytes")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        limits, body, now = self.limits, bytearray(), asyncio.get_running_loop().time
        started = now()
        try:
            async with asyncio.timeout(limits.body_seconds) as end:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
                    expected = started + len(body) / limits.body_rate
                    end.reschedule(min(now(), expected) + limits.body_seconds)
            return bytes(body)
        except TimeoutError as error:
            raise HTTPException(408, "the request did not arrive in time") from error

    async def _numbers(self, request: Request, limits: dict[str, tuple[int, int]]) -> dict:
        """The body: JSON with exactly these names, and integers within the limits."""
        body = await self.read_body(request, "application/json", self.limits.json_bytes)
        try:
            numbers = read_json(body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        if not isinstance(numbers, dict) or numbers.keys() != limits.keys():
            given = reprlib.repr(numbers)
            raise HTTPException(400, f"the request is {given}, expected {' and '.join(limits)}")
        for name, (low, high) in limits.items():
            if type(numbers[name]) is not int or not low <= numbers[name] <= high:
                given = reprlib.repr(numbers[name])
                expected = f"expected a whole number from {low} to {high}"
                raise HTTPException(400, f"{name} is {given}, {expected}")
        return numbers

    async def _run(self, request: Request, worker: Worker, work: Callable, *args) -> Any:
        """Runs the work when its turn comes, or drops it if the client leaves before."""
        with contextlib.nullcontext() if worker is self._finder else self._turns.first():
            done = asyncio.ensure_future(worker.run(work, *args))
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not done.done():
                    raise ClientDisconnect
                return done.result()
            except (ValueError, TypeError) as error:
                raise HTTPException(400, str(error)) from error
            finally:
                done.cancel()
                gone.cancel()

    async def _open(self, request: Request) -> Response:
        """Embeds the image in the body, for a new visitor or in place of an earlier image."""

        def work(content: bytes) -> tuple[EmbeddedImage, str]:
            embedded, shown = open_image_file(self.predictor, content)
            return embedded, _url(shown, "jpeg")

        self._forget()
        limits, address = self.limits, request.scope["client"][0]
        token = request.headers.get("x-session", "")
        with self._uploads.take(address):
            content = await self.read_body(request, "application/octet-stream", limits.max_bytes)
            embedded, url = await self._run(request, self._images, work, content)
        if token in self.visitors:
            self._drop(token)
        else:
            self._make_room(address)
            token = secrets.token_urlsafe(32)
        visitor = Visitor(address, Session(embedded), time.monotonic())
        self.visitors[token] = visitor
        asyncio.get_running_loop().call_later(limits.forget + 1, self._forget)
        height, width = embedded.size
        image = {"session": token, "image": url, "width": width, "height": height}
        return JSONResponse(_show(visitor.session) | image)

    def _change(self, change: Callable[..., Session], limits: dict) -> Callable:
        """The endpoint that changes a session."""

        def work(visitor: Visitor, numbers: dict[str, int]) -> dict[str, Any]:
            session = change(visitor.session, **numbers)
            if session.steps is not visitor.session.steps:
                session = predict(self.model, session)
            visitor.session, visitor.found = session, None
            return _show(session)

        async def endpoint(request: Request) -> Response:
            async with self._visiting(request, limits) as (visitor, numbers):
                visitor.stop.set()
                shown = await self._run(request, self._clicks, work, visitor, numbers)
                return JSONResponse(shown)

        return endpoint

    def _save(self, kind: str) -> Callable:
        """The endpoint that returns what is shown as a file, at the image's own size."""

        def work(session: Session, found: Found | None) -> bytes:
            if found is not None and kind == "json":
                return json.dumps(everything_json(found)).encode()
            if found is not None:
                return _encode(label_image(number_masks(found)), "png")
            if session.prediction is None:
                raise ValueError("there is no mask to save")
            mask = full_mask(self.model, session)
            if kind == "json":
                return json.dumps(prompt_json(session, mask)).encode()
            return _encode(Image.fromarray(mask), "png")

        async def endpoint(request: Request) -> Response:
            async with self._visiting(request, {}) as (visitor, _):
                shown = visitor.session, visitor.found
                with self._saves.take(request.scope["client"][0], request.headers["x-session"]):
                    file = await self._run(request, self._files, work, *shown)
                return Response(file, media_type=_SAVED[kind])

        return endpoint

    async def _everything(self, request: Request) -> Response:
        """Segments everything in the image, unless the visitor leaves or does something else."""
        limits = {"points_per_side": POINTS_PER_SIDE}
        async with self._visiting(request, limits) as (visitor, numbers):
            side = numbers["points_per_side"]
            visitor.stop.set()
            visitor.stop = stop = threading.Event()
            visitor.progress, session = (0, 0), visitor.session

            def on_batch(done: int, total: int) -> None:
                visitor.progress = done, total
                self._turns.wait()
                if stop.is_set():
                    raise ValueError("everything mode was stopped")

            def work() -> tuple[Found, str]:
                on_batch(0, 0)
                found = find_everything(self.model, session.image, side, on_batch)
                return found, _url(draw_layer(number_masks(found)), "png")

            try:
                found, layer = await self._run(request, self._finder, work)
                if stop.is_set():
                    raise HTTPException(400, "everything mode was stopped")
            finally:
                stop.set()
            visitor.session, visitor.found = clear(session), found
            return JSONResponse(_show(visitor.session) | {"mask": layer, "found": True})

    async def _progress(self, request: Request) -> Response:
        """The number of batches of everything mode that are done, and their total."""
        async with self._visiting(request, {}) as (visitor, _):
            return JSONResponse(visitor.progress)


def _file(name: str, kind: str, limits: Limits) -> Callable:
    """The endpoint that returns a file of this package."""
    text = Path(__file__).with_name(name).read_text().replace("{max_bytes}", str(limits.max_bytes))

    async def endpoint(_request: Request) -> Response:
        return Response(text, media_type=kind)

    return endpoint


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message[:1].upper() + message[1:]}, status)


async def _tell(_request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail)


async def _tell_failure(_request: Request, _error_: Exception) -> Response:
    return _error(500, "something went wrong; the server's log says what")


async def _tell_nobody(_request: Request, _error_: ClientDisconnect) -> Response:
    return Response(status_code=400)


def _show(session: Session) -> dict[str, Any]:
    """What the page shows of a session, except for the image."""
    shown = {"points": session.points, "box": session.box, "chosen": session.chosen}
    shown |= {"mask": None, "scores": [], "found": False}
    if session.prediction is not None:
        shown["mask"] = _url(draw_layer(session.prediction.masks[session.chosen]), "png")
        shown["scores"] = session.prediction.scores.tolist()
    return shown


def _url(image: Image.Image, kind: str) -> str:
    """The image as a data URL: only its visitor gets it, and it is never stored in a file."""
    content = base64.b64encode(_encode(image, kind)).decode()
    return f"data:image/{kind};base64,{content}"


def _encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()
