"""The server of the demo page."""

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from sam_jax.checkpoints import from_pretrained
from sam_jax.demo.guard import Guard
from sam_jax.demo.page import build_page
from sam_jax.demo.upload import upload_route
from sam_jax.demo.visit import warm_up
from sam_jax.models.sam import Sam

VISITORS = 50  # whose pictures are kept, about 10 MB each; of more the first ones are dropped
WAITING = 100  # clicks, uploads and others that may wait; more are told to come again

_FONTS = ["system-ui", "sans-serif"]


def serve(model: str, dtype: str, host: str, port: int, max_megabytes: int) -> None:
    """Serves the page until it is interrupted or terminated.

    Args:
        model: whatever `from_pretrained` takes.
        dtype: likewise.
        host: the address to listen at.
        port: likewise.
        max_megabytes: the size of the largest file that is taken.

    Raises:
        KeyboardInterrupt: when it is stopped.
        OSError: if the port is taken.
        ValueError: for numbers that cannot be.
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
    socket.create_server((host, port)).close()  # before compiling for a taken port
    # What stops services and containers deletes the files as Ctrl+C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print("Compiling the model ...", flush=True)
    sam = from_pretrained(model, dtype=dtype)
    warm_up(sam)
    with launch_page(sam, host, port, max_megabytes) as page:
        print(f"{page.local_url} is the page; Ctrl+C stops it.", flush=True)
        page.server.thread.join()


@contextlib.contextmanager
def launch_page(model: Sam, host: str, port: int, max_megabytes: int) -> Iterator[gr.Blocks]:
    """Serves a model's page in the background; see `serve`."""
    # What visitors upload and download lies where no other user reads it, and goes away.
    with tempfile.TemporaryDirectory(prefix="sam_jax_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        uploads = Path(folder, "uploads")
        uploads.mkdir()
        names = {host, "127.0.0.1", "localhost"} if _is_loopback(host) else None
        max_bytes = max_megabytes * gr.FileSize.MB
        page, threads = build_page(model).queue(max_size=WAITING), set(threading.enumerate())
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size=max_bytes,
            state_session_capacity=VISITORS,
            app_kwargs={
                # More than a file that is too large, which is refused with a message.
                "middleware": [Middleware(Guard, names=names, max_bytes=2 * max_bytes)],
                "routes": [upload_route(uploads, max_bytes, WAITING, page.upload_file_set)],
            },
            # Fonts that every machine has: nothing is loaded from elsewhere.
            theme=gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=["monospace"]),
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
        )
        try:
            yield page
        finally:
            page.close(verbose=False)
            # Python must not end while the model runs in one of gradio's threads.
            deadline = time.monotonic() + 8
            for thread in set(threading.enumerate()) - threads:
                thread.join(max(0, deadline - time.monotonic()))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
