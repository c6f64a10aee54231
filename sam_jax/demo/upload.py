"""Where the page's visitors send their pictures, in the place of gradio's own route.

Gradio keeps a file as long as downloads, under a name that all have who send the same, and what
breaks off for ever. Here a request is one whole file, or nothing is left of it, and the file is its
visitor's alone; whoever opens it deletes it.
"""

import contextlib
import re
import secrets
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

UPLOADED = re.compile(r"[^\0]+/[0-9a-f]{64}")  # the paths of its files


def upload_route(folder: Path, max_bytes: int, most: int, names: set[str]) -> Route:
    """Answers a form's file with a list of its path, as gradio does.

    Args:
        folder: where the files go.
        max_bytes: the size of the largest file that is taken.
        most: how many files may wait to be opened; of more the first are deleted, which are those
            of visitors who left.
        names: the paths are added to it, for who deletes files that are old.
    """

    async def upload(request: Request) -> Response:
        if not request.headers.get("Content-Type", "").startswith("multipart/form-data"):
            return PlainTextResponse("Expected a form, multipart/form-data.", 400)
        try:
            # Until the form is whole its file has no name, so that it cannot stay.
            form = await _WholeForm(request).parse()
        except MultiPartException as error:
            return PlainTextResponse(error.message, 400)
        try:
            file = form.get("files")
            if not isinstance(file, UploadFile):
                return PlainTextResponse("Expected a form with one file, `files`.", 400)
            if file.size > max_bytes:
                return PlainTextResponse(f"Expected a file of {max_bytes} bytes at most.", 413)
            path = await run_in_threadpool(_keep, file, folder, most)
        finally:
            await form.close()
        names.add(path)
        return JSONResponse([path])

    return Route("/gradio_api/upload", upload, methods=["POST"])


class _WholeForm(MultiPartParser):
    """A form with one file. If it breaks off, that is an error, by which the file is closed."""

    ended = False

    def __init__(self, request: Request):
        super().__init__(request.headers, self._chunks(request), max_files=1, max_fields=0)

    def on_end(self) -> None:
        self.ended = True

    async def _chunks(self, request: Request) -> AsyncGenerator[bytes, None]:
        with contextlib.suppress(ClientDisconnect):
            async for chunk in request.stream():
                yield chunk
        if not self.ended:
            raise MultiPartException("The form has no end.")


def _keep(file: UploadFile, folder: Path, most: int) -> str:
    path = folder / secrets.token_hex()
    with open(path, "xb") as kept:
        shutil.copyfileobj(file.file, kept)
    ages = {}
    for waiting in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # just opened
            ages[waiting] = waiting.stat().st_mtime_ns
    for old in sorted(ages, key=ages.get)[:-most]:
        old.unlink(missing_ok=True)
    return str(path)
