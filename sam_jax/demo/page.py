"""The demo page, in gradio, and its server.

Each browser tab has states of its own, which gradio keeps and drops; visitors share the model only.
"""

import base64
import io
import ipaddress
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image
from starlette.middleware import Middleware

from sam_jax.checkpoints import from_pretrained
from sam_jax.demo.guard import Guard
from sam_jax.demo.visit import (
    Visit,
    add_box,
    add_point,
    answer,
    choose,
    clear,
    draw_layer,
    everything_json,
    find_everything,
    full_mask,
    label_picture,
    number_masks,
    open_picture,
    prompt_json,
    undo,
    warm_up,
)
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import BACKGROUND, FOREGROUND
from sam_jax.visualize import MARKS

VISITORS = 50  # whose pictures are kept, about 10 MB each; of more the first ones are dropped
WAITING = 100  # clicks and other requests that may wait; more are told to come again
FORGET = 3600  # seconds without a click after which an embedding, and files, are dropped

_FONTS = ["system-ui", "sans-serif"]
_HINT = """
**Click** on an object for its mask, or **drag** a box around it. **Right-click** on what does not
belong to it.
"""


def serve(model: str, host: str, port: int, max_megabytes: int) -> None:
    """Serves the page until it is interrupted.

    Args:
        model: whatever `from_pretrained` takes.
        host: the address to listen at.
        port: likewise.
        max_megabytes: the size of the largest file that is taken.

    Raises:
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
    print("Compiling the model ...", flush=True)
    sam = from_pretrained(model)
    warm_up(sam)
    # What visitors upload and download lies where no other user reads it, and goes away.
    with tempfile.TemporaryDirectory(prefix="sam_jax_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        names = {host, "127.0.0.1", "localhost"} if _is_loopback(host) else None
        # More than a file that is too large, which gradio refuses with a message.
        guard = Middleware(Guard, names=names, max_bytes=2 * max_megabytes * 10**6)
        page = build_page(sam).queue(max_size=WAITING)
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{max_megabytes}mb",
            state_session_capacity=VISITORS,
            app_kwargs={"middleware": [guard]},
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
            print(f"{page.local_url} is the page; Ctrl+C stops it.", flush=True)
            page.server.thread.join()
        finally:
            page.close(verbose=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_page(model: Sam) -> gr.Blocks:
    """The page for a model."""
    with gr.Blocks(
        title="Segment Anything in JAX", analytics_enabled=False, delete_cache=(600, FORGET)
    ) as page:
        off: dict[str, Any] = {"interactive": False, "min_width": 80, "size": "md"}
        visit, found = gr.State(time_to_live=FORGET), gr.State(time_to_live=FORGET)
        gr.Markdown("# Segment Anything in JAX")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                stage = _stage()
            with gr.Column(scale=1, min_width=280):
                opener = gr.UploadButton("Open a picture", file_types=["image"], variant="primary")
                gr.Markdown(_HINT)
                label = gr.Radio(
                    [("object", FOREGROUND), ("background", BACKGROUND)],
                    value=FOREGROUND,
                    label="A click marks the",
                    elem_id="label",
                )
                with gr.Row():
                    back = gr.Button("Undo", **off, elem_id="undo")
                    again = gr.Button("Clear", **off, elem_id="clear")
                candidates = gr.Radio([], label="Candidates (predicted IoU)", elem_id="candidates")
                following = gr.Button("Next candidate", **off, elem_id="next")
                side = gr.Slider(
                    4, 32, value=16, step=4, precision=0, label="Points per side", elem_id="side"
                )
                everything = gr.Button("Segment everything", **off, elem_id="all")
                with gr.Row():
                    png = gr.DownloadButton("Save PNG", **off, elem_id="png")
                    rle = gr.DownloadButton("Save RLE", **off, elem_id="rle")

        # What follows a visit's state, in the order of what `_show` gives.
        marks = [visit, stage, candidates, following, back, again, png, rle]
        # One at a time, in the order in which they come: a click sees what the one before it did.
        turn = {
            "concurrency_id": "clicks",
            "concurrency_limit": 1,
            "trigger_mode": "multiple",
            "api_visibility": "private",
        }
        quiet = {"show_progress": "hidden"}
        on_stage = {"show_progress_on": stage}

        def open_(path: str):
            try:
                picture, shown = open_picture(model, path)
            except (ValueError, TypeError) as error:
                raise _error(str(error).replace(path, "the file")) from error
            height, width = picture.size
            visit, stage, *others = _show(Visit(picture))
            stage |= {"picture": _url(shown, "jpeg"), "width": width, "height": height}
            return None, gr.update(interactive=True), visit, stage, *others

        def press(visit: Visit | None, label: int, event: gr.EventData):
            label = BACKGROUND if event.right else label
            try:
                visit = add_point(_open(visit), event.x, event.y, label)
            except ValueError as error:
                raise _error(str(error)) from error
            return _show(answer(model, visit))

        def drag(visit: Visit | None, event: gr.EventData):
            corners = event.x0, event.y0, event.x1, event.y1
            return _show(answer(model, add_box(_open(visit), *corners)))

        def take_back(visit: Visit | None):
            return _show(answer(model, undo(_open(visit))))

        def begin_again(visit: Visit | None):
            return _show(clear(_open(visit)))

        def select(visit: Visit | None, candidate: int):
            return _show(choose(_open(visit), candidate))

        def follow(visit: Visit | None):
            visit = _open(visit)
            return _show(choose(visit, visit.chosen + 1))

        def save(visit: Visit | None):
            if visit is None or visit.answer is None:
                return gr.skip(), gr.skip()
            mask = full_mask(model, visit)
            return _files("mask", Image.fromarray(mask), prompt_json(visit, mask))

        def find(visit: Visit | None, points_per_side: int, progress=gr.Progress()):  # noqa: B008
            progress(0)
            visit = _open(visit)
            found = find_everything(
                model,
                visit.picture,
                points_per_side,
                lambda done, total: progress((done, total), unit="batches"),
            )
            # Here and not in the clicks' turn, where others would wait for it.
            numbers = number_masks(found)
            files = _files("everything", label_picture(numbers), everything_json(found))
            return visit.picture, visit.prompts, _url(draw_layer(numbers), "png"), files

        def show_found(visit: Visit | None, found: tuple):
            picture, prompts, layer, files = found
            if visit is None or visit.picture is not picture or visit.prompts != prompts:
                return None, *[gr.skip()] * len(marks)  # something else is shown by now
            visit, stage, *others = _show(clear(visit))
            stage["mask"] = layer
            return None, visit, stage, *others[:-2], *files

        for event in (
            opener.upload(open_, opener, [opener, everything, *marks], **turn, **on_stage),
            stage.press(press, [visit, label], marks, **turn, **quiet),
            stage.drag(drag, visit, marks, **turn, **quiet),
            back.click(take_back, visit, marks, **turn, **quiet),
            again.click(begin_again, visit, marks, **turn, **quiet),
            candidates.input(select, [visit, candidates], marks, **turn, **quiet),
            following.click(follow, visit, marks, **turn, **quiet),
        ):
            event.success(save, visit, [png, rle], **turn, **quiet)
        everything.click(
            find, [visit, side], found, concurrency_limit=1, api_visibility="private", **on_stage
        ).success(show_found, [visit, found], [found, *marks], **turn, **quiet)
    return page


def _stage() -> gr.HTML:
    """The picture with what is drawn on it; it has the events `press` and `drag`.

    Places on it are in percent, so that they stay where they belong however large it is shown.
    """
    html, css, js = (
        Path(__file__).with_name(f"stage.{kind}").read_text() for kind in ("html", "css", "js")
    )
    colors = {
        name: f"rgb{MARKS[label]}"
        for name, label in (("object_color", FOREGROUND), ("background_color", BACKGROUND))
    }
    empty = {"picture": "", "mask": "", "width": 1, "height": 1, "points": [], "box": []}
    return gr.HTML(
        html_template=html,
        css_template=css,
        js_on_load=js,
        apply_default_css=False,
        elem_id="stage",
        **empty,
        **colors,
    )


def _show(visit: Visit) -> list[Any]:
    """The visit, and updates of the stage, candidates, their button, undo, clear, downloads."""
    scores, mask = [], ""
    if visit.answer is not None:
        scores = visit.answer.scores
        mask = _url(draw_layer(visit.answer.masks[visit.chosen]), "png")
    stage = gr.update(mask=mask, points=visit.points, box=visit.box or [])
    choices = [(f"{score:.2f}", i) for i, score in enumerate(scores)]
    some = gr.update(interactive=bool(visit.prompts))
    return [
        visit,
        stage,
        gr.update(choices=choices, value=visit.chosen if choices else None),
        gr.update(interactive=len(scores) > 1),
        some,
        some,
        *[gr.update(interactive=False)] * 2,  # until the files are written
    ]


def _open(visit: Visit | None) -> Visit:
    if visit is None:
        raise _error(
            "There is no picture, or it was dropped after a long time or for others. Open one first"
        )
    return visit


def _error(message: str) -> gr.Error:
    return gr.Error(message[0].upper() + message[1:], print_exception=False)


def _url(picture: Image.Image, kind: str) -> str:
    """The picture within a URL, so that it goes to its own visitor and is in no file."""
    content = base64.b64encode(_encode(picture, kind)).decode()
    return f"data:image/{kind};base64,{content}"


def _encode(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, quality=90)
    return file.getvalue()


def _files(name: str, picture: Image.Image, records: dict[str, Any]) -> list[dict]:
    """Updates of the downloads; gradio drops the files in time."""
    contents = {"png": _encode(picture, "png"), "json": json.dumps(records).encode()}
    folder = os.environ["GRADIO_TEMP_DIR"]
    return [
        gr.update(value=save_bytes_to_cache(content, f"{name}.{kind}", folder), interactive=True)
        for kind, content in contents.items()
    ]
