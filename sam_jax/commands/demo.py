"""`sam-jax demo`."""

import dataclasses
from typing import Annotated

import tyro

from sam_jax.commands.common import ModelOptions
from sam_jax.errors import needs_extra


@dataclasses.dataclass(frozen=True)
class Demo(ModelOptions):
    """Serve a local web page: drop an image, click on an object, see its mask."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 makes the page reachable from other machines."""
    port: int = 7860
    """Port to listen on."""
    max_megabytes: int = 20
    """Largest accepted image file, in megabytes."""
    allow_host: Annotated[
        tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="NAME[:PORT]")
    ] = dataclasses.field(default_factory=list)
    """Another host name of the page, such as a proxy's."""


def demo(args: Demo) -> None:
    """Serves the page until it is interrupted; see `sam_jax.demo`.

    Raises:
        KeyboardInterrupt: when it is stopped.
        OSError: if the port is in use.
        ValueError: for invalid options or an unknown model.
        MissingExtra: without the extra `demo`.
    """
    with needs_extra("demo"):
        from sam_jax.commands.heap import keep_heap
        from sam_jax.demo.server import serve

    keep_heap()
    serve(
        *(args.model, args.dtype, args.runtime),
        *(args.host, args.port, args.max_megabytes, args.allow_host),
    )
