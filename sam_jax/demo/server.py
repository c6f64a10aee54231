"""The server of the demo page."""

import asyncio
import contextlib
import ctypes
import errno
import gc
import ipaddress
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from sam_jax.checkpoints import from_pretrained
from sam_jax.demo.app import Demo
from sam_jax.demo.limits import Limits
from sam_jax.demo.visit import warm_up


def serve(
    model: str, dtype: str, host: str, port: int, max_megabytes: int, allow_host: Collection[str]
) -> None:
    """Serves the page until it is interrupted or terminated.

    Args:
        model: whatever `from_pretrained` takes.
        dtype: likewise.
        host: the address to listen at.
        port: likewise.
        max_megabytes: the size of the largest file that is taken.
        allow_host: what the page may be called besides, as NAME or NAME:PORT.

    Raises:
        KeyboardInterrupt: when it is stopped.
        OSError: if the port is taken.
        ValueError: for invalid numbers.
    """
    if max_megabytes < 1:
        raise ValueError(f"--max-megabytes is {max_megabytes}, expected 1 or more")
    if not 1 <= port < 65536:
        raise ValueError(f"--port is {port}, expected 1 to 65535")
    if not host or ":" in host:
        raise ValueError(f"--host is {host!r}, expected a name or an IPv4 address")
    if not _is_loopback(host):
        print(
            f"sam-jax: warning: whoever reaches port {port} of this machine can use the page; it "
            "asks for no password and encrypts nothing",
            file=sys.stderr,
        )
    silence_decoders()
    with _listen(host, port) as listener:  # before compiling for a taken port
        # What stops services and containers ends it as Ctrl+C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print("Compiling the model ...", flush=True)
        sam = from_pretrained(model, dtype=dtype)
        warm_up(sam)
        # What is there now stays; looking through it for garbage stops a click for half a second.
        gc.collect()
        gc.freeze()
        hosts = host_names(host, port, allow_host)
        app = Demo(sam, hosts, Limits(max_bytes=max_megabytes * 10**6))
        with running(app, listener) as server:
            print(f"http://{host}:{port}/ is the page; Ctrl+C stops it.", flush=True)
            server.result()


def silence_decoders() -> None:
    """Keeps messages about damaged images out of the log; the visitor gets one as the answer.

    They are Pillow's warnings and errors, and those that libtiff prints by itself.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):  # this Pillow does not export libtiff
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        other = port + 1 if port < 65535 else port - 1
        raise OSError(f"port {port} is already in use: try --port {other}") from error


def host_names(host: str, port: int, others: Collection[str] = ()) -> set[str]:
    """What the header Host may be, besides the address that a connection comes to."""
    names = {host, "localhost", "127.0.0.1", *others}
    if not _is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
    names = {name if ":" in name else f"{name}:{port}" for name in map(str.lower, names)}
    # A browser leaves the usual port out.
    return names | {name.removesuffix(":80") for name in names}


@contextlib.contextmanager
def running(app: Demo, listener: socket.socket, **timing: float) -> Iterator[Future]:
    """Serves the application in the background, until the context ends.

    Args:
        app: the application.
        listener: where it is served.
        timing: in the place of `Connection`'s attributes.
    """
    config = uvicorn.Config(
        app,
        http=type("Connection", (Connection,), timing),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.run, [listener])
        try:
            yield ended
        finally:
            server.should_exit = True
            ended.result()
            app.close()


class Connection(H11Protocol):
    """A client's connection, which ends if nothing comes or goes.

    uvicorn lets a client that sends no request, or half a request's head, stay forever, and one
    that does not read its answer.
    """

    seconds = 15  # without a whole request's head, or with an answer that is not read
    most = 256  # connections; of more the one that has been idle the longest ends

    def connection_made(self, transport: asyncio.Transport) -> None:  # noqa: D102
        super().connection_made(transport)
        self._unread = None
        self._wait()
        there = [
            other
            for other in self.connections
            if isinstance(other, Connection) and not other.transport.is_closing()
        ]
        if len(there) > self.most:
            idle = [other for other in there if other.idle]
            min(idle, key=lambda other: other.since).transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self.since = self.loop.time()
        self._timer = self.loop.call_later(self.seconds, self._end)

    def _end(self) -> None:
        if self.idle:
            self.transport.abort()

    def shutdown(self) -> None:
        """When the server stops: as if the client left, which ends what is done for it."""
        self.transport.abort()

    def on_response_complete(self) -> None:  # noqa: D102
        self._timer.cancel()
        self._wait()
        super().on_response_complete()

    def pause_writing(self) -> None:  # noqa: D102
        super().pause_writing()
        self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:  # noqa: D102
        super().resume_writing()
        self._read()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._timer.cancel()
        self._read()
        super().connection_lost(exc)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
