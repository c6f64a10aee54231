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
from sam_jax.compilation_cache import enable_compilation_cache
from sam_jax.demo.app import Demo
from sam_jax.demo.limits import Limits
from sam_jax.predictor import SamPredictor
from sam_jax.types import Runtime


def serve(
    model: str,
    dtype: str,
    runtime: Runtime,
    host: str,
    port: int,
    max_megabytes: int,
    allow_host: Collection[str],
) -> None:
    """Serves the page until it is interrupted or terminated.

    Args:
        model: what `from_pretrained` takes.
        dtype: the compute dtype, as for `from_pretrained`.
        runtime: what runs the image encoder, as for `SamPredictor`.
        host: the address to listen on.
        port: the port to listen on.
        max_megabytes: size of the largest accepted image file.
        allow_host: further host names of the page, as NAME or NAME:PORT.

    Raises:
        KeyboardInterrupt: when it is stopped.
        OSError: if the port is in use.
        ValueError: for an invalid host, port or size.
    """
    if max_megabytes < 1:
        raise ValueError(f"--max-megabytes is {max_megabytes}, expected 1 or more")
    if not 1 <= port < 65536:
        raise ValueError(f"--port is {port}, expected 1 to 65535")
    if not host or ":" in host:
        raise ValueError(f"--host is {host!r}, expected a name or an IPv4 address")
    if not _is_loopback(host):
        print(
            f"sam-jax: warning: everyone who can reach port {port} of this machine can use the "
            "page; it has no password and no encryption",
            file=sys.stderr,
        )
    silence_decoders()
    with _listen(host, port) as listener:  # fails before compiling if the port is in use
        # SIGTERM, which stops services and containers, acts like Ctrl+C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        enable_compilation_cache()
        predictor = SamPredictor(from_pretrained(model, dtype=dtype), runtime=runtime)
        hosts = host_names(host, port, allow_host)
        app = Demo(predictor, hosts, Limits(max_bytes=max_megabytes * 10**6))
        begun = app.warm_up()
        with running(app, listener) as server:
            print(f"The page is at http://{host}:{port}/; press Ctrl+C to stop.", flush=True)
            for work in begun:
                work.result()
            # Garbage collection of the objects made so far would delay clicks by half a second.
            gc.freeze()
            print("The model is compiled.", flush=True)
            server.result()


def silence_decoders() -> None:
    """Keeps messages of Pillow and libtiff about damaged images out of the log.

    The visitor gets the error as the answer.
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
    """Accepted values of the Host header, in addition to the address of the connection."""
    names = {host, "localhost", "127.0.0.1", *others}
    if not _is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
    names = {name if ":" in name else f"{name}:{port}" for name in map(str.lower, names)}
    # Browsers omit the default port.
    return names | {name.removesuffix(":80") for name in names}


@contextlib.contextmanager
def running(app: Demo, listener: socket.socket, **timing: float) -> Iterator[Future]:
    """Serves the application in the background, until the context ends.

    Args:
        app: the application.
        listener: the listening socket.
        timing: override attributes of `Connection`.
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
    """A client's connection, which is closed if the client is idle.

    uvicorn never closes the connection of a client that sends no request, or half of a request's
    head, or does not read its answer.
    """

    seconds = 15  # without a whole request head, or with an answer that is not read
    most = 256  # connections; beyond that, the one that has been idle the longest is closed

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
        """Acts as if the client had left, which ends its work; called when the server stops."""
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
