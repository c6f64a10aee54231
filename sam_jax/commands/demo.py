"""`sam-jax demo`."""

import dataclasses
from typing import Annotated

import tyro

from sam_jax.errors import needs_extra
from sam_jax.types import DType


@dataclasses.dataclass
class Demo:
    """Serve a web page on which you drop an image, click, and see the mask."""

    model: str = "mobile_sam"
    """Short name, hub repository, file or folder."""
    dtype: DType = "float32"
    """What to compute in; bfloat16 is faster on a GPU or TPU."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of this machine's, for other machines to reach it."""
    port: int = 7860
    """Port to listen at."""
    max_megabytes: int = 20
    """Size of the largest file that is taken."""
    allow_host: Annotated[
        tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="NAME[:PORT]")
    ] = dataclasses.field(default_factory=list)
    """Another name under which browsers reach the page, such as a proxy's. May be repeated."""


def demo(args: Demo) -> None:
    """Serves the page until it is interrupted; see `sam_jax.demo`.

    Raises:
        KeyboardInterrupt: when it is stopped.
        OSError: if the port is taken.
        ValueError: for invalid numbers and an unknown model.
        MissingExtra: without the extra `demo`.
    """
    with needs_extra("demo"):
        from sam_jax.demo.server import serve

    serve(args.model, args.dtype, args.host, args.port, args.max_megabytes, args.allow_host)
