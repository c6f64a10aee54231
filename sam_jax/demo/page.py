"""The demo page, in gradio.

Each browser tab has states of its own, which gradio keeps and drops; visitors share the model only.
"""

import base64
import contextlib
import functools
import io
import json
import os
import reprlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image

from sam_jax.demo.visit import (
    Picture,
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
)
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import BACKGROUND, FOREGROUND
from sam_jax.visualize import MARKS

FORGET = 3600  # seconds without a click after which an embedding, and files, are dropped
POINTS_PER_SIDE = 4, 32  # of everything-mode, the fewest and the most

_HINT = """
**Click** on an object for its mask, or **drag** a box around it. **Right-click** on what does not
belong to it.

Keys: **arrows** (**Shift**: far), **Enter**; **B** for background, **X** for a box's corners.
"""
_GONE = "The picture was dropped, after a long time or for other visitors. Open it again."
_EMPTY = {"picture": "", "mask": "", "width": 1, "height": 1, "points": [], "box": []}
_PIXELS = -(10**9), 10**9  # what lies outside the picture moves to its edge


def build_page(model: Sam) -> gr.Blocks:
    """The page for a model; it is served by `launch_page`, which says where its files go.

    What visitors do wrong raises nothing here: they are told, on the page.

    Args:
        model: shared by all visitors.
    """
    with gr.Blocks(
        title="Segment Anything in JAX", analytics_enabled=False, delete_cache=(600, FORGET)
    ) as page:
        off: dict[str, Any] = {"interactive": False, "min_width": 80, "size": "md"}
        visit, opened, saved, found = (gr.State(time_to_live=FORGET) for _ in range(4))
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
                    *POINTS_PER_SIDE, value=16, step=4, label="Points per side", elem_id="side"
                )
                everything = gr.Button("Segment everything", **off, elem_id="all")
                with gr.Row():
                    png = gr.DownloadButton("Save PNG", **off, elem_id="png")
                    rle = gr.DownloadButton("Save RLE", **off, elem_id="rle")

        # What follows a visit's state, in the order of what `_show` gives.
        marks = [visit, stage, everything, candidates, following, back, again, png, rle]
        # Whose everything-mode runs, and on what; who leaves or opens another is not in it.
        finding: dict[str, Picture] = {}

        # Values come as the browser sent them and are checked here: gradio's own checks let NaN
        # through, print tracebacks, and leave an empty file for each upload.
        raw: dict[str, Any] = {
            "preprocess": False,
            "concurrency_limit": 1,
            "trigger_mode": "multiple",
            "api_visibility": "private",
        }
        # One at a time, in the order in which they come: a click sees what the one before it did.
        turn = {**raw, "concurrency_id": "clicks"}
        quiet = {"show_progress": "hidden"}
        on_stage = {"show_progress_on": stage}

        # In turns of their own, since others' clicks would wait for a large picture. What they give
        # is shown in the clicks' turn, and not if something else is shown by then.
        def open_(file: dict[str, Any] | None, request: gr.Request):
            if file is None:
                raise _error("no file was sent")
            path = file["path"]
            try:
                picture, shown = open_picture(model, path)
            except (ValueError, TypeError) as error:
                raise _error(str(error).replace(path, "the file")) from error
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            finding.pop(request.session_hash, None)
            return None, (picture, _url(shown, "jpeg"))

        def show_opened(visit: Visit | None, opened: tuple | None):
            if opened is None:
                gr.Warning(_GONE)
                return _show(None)
            picture, url = opened
            if visit is not None and visit.picture is picture:
                return [gr.skip()] * len(marks)  # by the event of one that was opened before it
            height, width = picture.size
            visit, stage, *others = _show(Visit(picture))
            stage |= {"picture": url, "width": width, "height": height}
            return visit, stage, *others

        def changing(change: Callable[..., Visit]) -> Callable[..., list]:
            """A handler of an event that changes the visit."""

            @functools.wraps(change)
            def handle(visit: Visit | None, *values: Any):
                if visit is None:
                    gr.Warning(_GONE)
                    return _show(None)
                try:
                    changed = change(visit, *values)
                except gr.Error:
                    raise
                except ValueError as error:
                    raise _error(str(error)) from error
                same = changed.prompts is visit.prompts
                return _show(changed if same else answer(model, changed))

            return handle

        def press(visit: Visit, label: Any, event: gr.EventData):
            x, y, right = _numbers(event, x=_PIXELS, y=_PIXELS, right=(0, 1))
            label = _number("the label", label, BACKGROUND, FOREGROUND)
            return add_point(visit, x, y, BACKGROUND if right else label)

        def drag(visit: Visit, event: gr.EventData):
            return add_box(visit, *_numbers(event, x0=_PIXELS, y0=_PIXELS, x1=_PIXELS, y1=_PIXELS))

        def select(visit: Visit, candidate: Any):
            last = len(visit.answer.scores) - 1 if visit.answer else 0
            return choose(visit, _number("the candidate", candidate, 0, last))

        def follow(visit: Visit):
            return choose(visit, visit.chosen + 1)

        def save(visit: Visit | None, saved: tuple | None):
            if visit is None or visit.answer is None or (saved and saved[0] is visit):
                return saved
            mask = full_mask(model, visit)
            return visit, _files("mask", Image.fromarray(mask), prompt_json(visit, mask))

        def show_saved(visit: Visit | None, saved: tuple | None):
            return saved[1] if saved and saved[0] is visit else [gr.skip()] * 2

        def find(
            visit: Visit | None,
            points_per_side: Any,
            request: gr.Request,
            progress=gr.Progress(),  # noqa: B008
        ):
            if visit is None:
                return None
            side = _number("the number of points per side", points_per_side, *POINTS_PER_SIDE)
            progress(0)
            finding[request.session_hash] = visit.picture

            def on_batch(done: int, total: int) -> None:
                if not page.is_running or finding.get(request.session_hash) is not visit.picture:
                    raise CancelledError
                progress((done, total), unit="batches")

            try:
                found = find_everything(model, visit.picture, side, on_batch)
            except CancelledError:
                return None
            finally:
                finding.pop(request.session_hash, None)
            numbers = number_masks(found)
            files = _files("everything", label_picture(numbers), everything_json(found))
            return visit.picture, visit.prompts, _url(draw_layer(numbers), "png"), files

        def show_found(visit: Visit | None, found: tuple | None):
            if visit is None:
                gr.Warning(_GONE)
                return None, *_show(None)
            picture, prompts, layer, files = found or (None,) * 4
            if visit.picture is not picture or visit.prompts != prompts:
                return None, *[gr.skip()] * len(marks)  # something else is shown by now
            visit, stage, *others = _show(clear(visit))
            stage["mask"] = layer
            return None, visit, stage, *others[:-2], *files

        def leave(request: gr.Request):
            finding.pop(request.session_hash, None)

        opening = opener.upload(open_, opener, [opener, opened], **raw, **on_stage).success(
            show_opened, [visit, opened], marks, **turn, **quiet
        )
        for event in (
            opening,
            stage.press(changing(press), [visit, label], marks, **turn, **quiet),
            stage.drag(changing(drag), visit, marks, **turn, **quiet),
            back.click(changing(undo), visit, marks, **turn, **quiet),
            again.click(changing(clear), visit, marks, **turn, **quiet),
            candidates.input(changing(select), [visit, candidates], marks, **turn, **quiet),
            following.click(changing(follow), visit, marks, **turn, **quiet),
        ):
            event.success(save, [visit, saved], saved, **raw, **quiet).success(
                show_saved, [visit, saved], [png, rle], **turn, **quiet
            )
        once = {**raw, "trigger_mode": "once"}
        everything.click(find, [visit, side], found, **once, **on_stage).success(
            show_found, [visit, found], [found, *marks], **turn, **quiet
        )
        page.unload(leave)
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
    return gr.HTML(
        html_template=html,
        css_template=css,
        js_on_load=js,
        apply_default_css=False,
        elem_id="stage",
        **_EMPTY,
        **colors,
    )


def _show(visit: Visit | None) -> list[Any]:
    """The visit, and updates of the stage, of the buttons and candidates, and of the downloads."""
    scores, shown = [], dict(_EMPTY)
    if visit is not None:
        shown = {"mask": "", "points": visit.points, "box": visit.box or []}
        if visit.answer is not None:
            scores = visit.answer.scores
            shown["mask"] = _url(draw_layer(visit.answer.masks[visit.chosen]), "png")
    choices = [(f"{score:.2f}", i) for i, score in enumerate(scores)]
    some = gr.update(interactive=visit is not None and bool(visit.prompts))
    return [
        visit,
        gr.update(**shown),
        gr.update(interactive=visit is not None),
        gr.update(choices=choices, value=visit.chosen if choices else None),
        gr.update(interactive=len(scores) > 1),
        some,
        some,
        *[gr.update(interactive=False)] * 2,  # until the files are written
    ]


def _numbers(event: gr.EventData, **limits: tuple[int, int]) -> list[int]:
    """What an event tells, by name."""
    told = event._data if isinstance(event._data, dict) else {}
    return [_number(name, told.get(name), *limits[name]) for name in limits]


def _number(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or not low <= value <= high:
        given = reprlib.repr(value)
        raise _error(f"{name} is {given}, expected a whole number from {low} to {high}")
    return value


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
