"""The command `sam-jax`."""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from sam_jax.checkpoints import from_pretrained
from sam_jax.checkpoints.sources import MODELS
from sam_jax.export import Platform, check_new, export_jax, export_onnx
from sam_jax.files import lock_folder, read_json, temporary_folder, write_json
from sam_jax.folder import (
    Format,
    Results,
    Segmentation,
    find_pictures,
    generate_folder,
    generate_with_ray,
    passed_over,
)
from sam_jax.image import load_image
from sam_jax.mask_generator import SamAutomaticMaskGenerator, check_arguments, check_scores
from sam_jax.predictor import SamPredictor
from sam_jax.processing import check_boxes, check_points
from sam_jax.training.data import BadAnnotations, open_source
from sam_jax.training.evaluate import evaluate as evaluate_model
from sam_jax.visualize import overlay

DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass
class Segment:
    """Segment what points or boxes show in a picture.

    All points belong to one object. Each box is an object of its own; points go together with a
    single box.
    """

    image: tyro.conf.Positional[Path]
    """The picture."""
    point: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="X,Y[,LABEL]")] = (
        dataclasses.field(default_factory=list)
    )
    """A point in pixels; label 1 (the default) is on the object, 0 is not. May be repeated."""
    box: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="X0,Y0,X1,Y1")] = (
        dataclasses.field(default_factory=list)
    )
    """A box in pixels. May be repeated."""
    model: str = "mobile_sam"
    """Short name, hub repository, file or folder."""
    dtype: DType = "float32"
    """What to compute in; bfloat16 is faster on a GPU or TPU."""
    output: Path | None = None
    """Folder for the results, `<picture>_masks` if left out; those of an earlier run are
    replaced."""
    multimask: bool | None = None
    """Three candidate masks per object instead of one; by default for a single point only."""


@dataclasses.dataclass
class Generate:
    """Find the masks of everything in pictures.

    The run can be stopped and started again: pictures that have a result are passed over.
    """

    input: tyro.conf.Positional[tuple[Path, ...]]
    """Images and folders of images, whose subfolders are not searched."""
    output: Path
    """Folder for the results."""
    model: str = "mobile_sam"
    """Short name, hub repository, file or folder."""
    dtype: DType = "float32"
    """What to compute in; bfloat16 is faster on a GPU or TPU."""
    format: Format = "png"
    """A folder of PNG masks with metadata.csv for each picture, or one annotations.json of COCO's
    format for all that the output folder has results of."""
    segmentation: Segmentation = "rle"
    """How annotations.json holds masks: run lengths, or polygons for programs that read nothing
    else (about five times the size). It applies to all results in the folder."""
    overlays: bool = False
    """Also draw each picture with its masks."""
    devices: int | None = None
    """How many devices of this machine to use, one picture on each; all of them if left out."""
    ray: tuple[str, ...] | None = None
    """Use the machines of a Ray cluster: the one at this address, or without an address one that
    runs here or a new one. All machines must see the same folders."""
    points_per_side: int | None = None
    """Points along one side of the picture, 32 if left out; their number is its square."""
    points_per_batch: int = 64
    """Points decoded by one call; on a GPU or TPU more take more memory."""
    pred_iou_thresh: float = 0.88
    """What a mask's predicted IoU must exceed."""
    stability_score_thresh: float = 0.95
    """What a mask's stability must reach."""
    stability_score_offset: float = 1.0
    """How much higher and lower the thresholds are that stability compares."""
    box_nms_thresh: float = 0.7
    """IoU of boxes above which only the better mask stays."""
    crop_n_layers: int = 0
    """Layers of crops to look at too, 2^i x 2^i in layer i."""
    crop_nms_thresh: float = 0.7
    """Like box_nms_thresh, between crops."""
    crop_overlap_ratio: float = 512 / 1500
    """How much of the picture's shorter side the crops of the first layer overlap."""
    crop_n_points_downscale_factor: int = 1
    """How many times fewer points per side each further layer has."""
    point_grids: Path | None = None
    """JSON file with a list of points [x, y], from 0 to 1, for each layer; instead of
    points_per_side."""
    min_mask_region_area: int = 0
    """Fill holes and drop islands of fewer pixels."""


@dataclasses.dataclass
class Evaluate:
    """Compare a model's masks with annotated objects, by the number of clicks and by box.

    Prints mean IoUs over all objects as JSON; see `sam_jax.training.evaluate`.
    """

    annotations: tyro.conf.Positional[Path]
    """A COCO instance file, or a folder of SA-1B."""
    images: Path | None = None
    """The COCO file's folder of pictures."""
    bad_annotations: BadAnnotations = "refuse"
    """List what is wrong with the file and stop, or leave it out."""
    model: str = "mobile_sam"
    """Short name, hub repository, file or folder."""
    dtype: DType = "float32"
    """What to compute in; bfloat16 is faster on a GPU or TPU."""


@dataclasses.dataclass
class Export:
    """Write the model for programs without sam_jax: for JAX, or in ONNX.

    See `sam_jax.export`, and `examples/load_export.py` and `load_onnx.py` for how to use it.
    """

    model: tyro.conf.Positional[str]
    """Short name, hub repository, file or folder."""
    output: Path
    """The new folder."""
    format: Literal["jax", "onnx"] = "jax"
    """Programs of jax.export, or ONNX."""
    platforms: tuple[Platform, ...] | None = None
    """Of jax: to run on; cpu, cuda and tpu if left out."""
    dtype: DType = "float32"
    """Of jax: what to compute in."""
    gradient: bool = False
    """Of jax: programs that jax.grad can differentiate, once. Writing them takes several times as
    long."""
    single_mask: bool = False
    """Of onnx: one mask instead of four, chosen by the number of points and the scores."""


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


# The fields that say which masks there are: what is in one folder must have them in common.
_ARGUMENTS = inspect.signature(SamAutomaticMaskGenerator).parameters
_GENERATOR = {f.name for f in dataclasses.fields(Generate)} & set(_ARGUMENTS) - {"model"}


def generate(args: Generate) -> None:
    """Writes the results of all pictures; see `sam_jax.folder`.

    Raises:
        OSError: for a path that does not exist, a folder that cannot be written to, or a full disk.
        ValueError: for options that cannot be or do not go together, for results that are there
            and were made otherwise, for an unknown model, if another run works in the folder, and,
            when all others are done, for images that cannot be read or written; the message names
            them.
    """
    pictures = find_pictures(args.input)
    if any(os.path.realpath(path) == os.path.realpath(args.output) for path in args.input):
        raise ValueError(f"--output {args.output} is an input, too; choose another folder")
    if args.segmentation == "polygons" and args.format != "coco":
        raise ValueError("--segmentation polygons is for --format coco")
    if args.ray is not None and len(args.ray) > 1:
        raise ValueError(f"--ray is {' '.join(args.ray)!r}, expected one address or none")
    if args.ray is not None and args.devices is not None:
        raise ValueError("--devices is for this machine; it cannot be given with --ray")
    options = {name: getattr(args, name) for name in sorted(_GENERATOR)}
    if args.point_grids is not None:
        options["point_grids"] = _read_grids(args.point_grids)
    elif args.points_per_side is None:
        options["points_per_side"] = 32
    grids = check_arguments(**options)
    model = args.model
    if model not in MODELS and Path(model).exists():
        model = str(Path(model).resolve())
    results = Results(args.output, args.format, args.overlays, args.segmentation)
    how_many = {"points_per_batch"}
    settings = {k: v for k, v in options.items() if k not in how_many}
    settings = {"model": model, "dtype": args.dtype, **settings}

    failures: list[str] = []
    with lock_folder(args.output):
        todo = results.begin(settings, pictures)
        for line in passed_over(args.input, args.output):
            _say(line)
        if todo:
            _say_what_crops_take(grids)
        try:
            if todo:
                _generate(args, model, options, results, todo, len(pictures), failures)
        except BaseException:
            print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr)
            raise
        joined, *left_out = results.finish() or [None]
    print(f"{len(pictures) - len(failures)} of {len(pictures)} pictures in {args.output}")
    if joined:
        print(joined)
    for line in left_out:
        _say(line)
    if failures:
        raise ValueError("\n".join([f"{len(failures)} failed:", *failures]))


def _generate(args, model, options, results, todo, total, failures) -> None:
    options["output_mode"] = "uncompressed_rle"
    done, start, bars = total - len(todo), time.monotonic(), []

    def on_image() -> None:
        if bars:
            bars[0].update()
            return
        # From here on, so that the rate is that of images for which nothing is compiled.
        _say(f"the first image took {time.monotonic() - start:.1f} s")
        bar = tqdm(total=total, initial=done + 1, unit="image", miniters=1)
        bars.append(stack.enter_context(bar))

    def on_failure(picture: Path, problem: str) -> None:
        failures.append(f"  {picture}: {problem}")

    with contextlib.ExitStack() as stack:
        if args.ray is not None:
            _say("starting workers, which compile the image encoder and the mask decoder ...")
            address = args.ray[0] if args.ray else None
            generate_with_ray(
                address, model, args.dtype, options, todo, results, on_image, on_failure
            )
        else:
            mesh = Mesh(np.array(_devices(args.devices)), ("images",))
            sam = from_pretrained(model, dtype=args.dtype)
            generator = SamAutomaticMaskGenerator(sam, **options, mesh=mesh)
            _say_compiling("once for all images")
            generate_folder(generator, todo, results, on_image, on_failure)


def _say(text: str) -> None:
    """To the person who waits, and not to a program that reads the output."""
    tqdm.write(text, sys.stderr)
    sys.stderr.flush()


def _say_compiling(how_often: str = "once") -> None:
    _say(f"compiling the image encoder and the mask decoder, {how_often} ...")


def _say_what_crops_take(grids: list[np.ndarray]) -> None:
    crops = [4**layer for layer in range(len(grids))]
    points = [count * len(grid) for count, grid in zip(crops, grids, strict=True)]
    if len(crops) > 1:
        low, high = sorted((sum(points) / len(grids[0]), float(sum(crops))))
        times = f"{high:.0f}" if round(low) == round(high) else f"{low:.1f} to {high:.0f}"
        _say(
            f"{sum(crops) - 1} crops per image: the encoder runs {sum(crops)} times instead of "
            f"once, and {sum(points)} points are decoded instead of {points[0]}; expect {times} "
            "times the time of a run without crops"
        )


def _devices(count: int | None) -> list[jax.Device]:
    """So many of this machine's, or all."""
    available = jax.local_devices()
    count = len(available) if count is None else count
    if not 1 <= count <= len(available):
        raise ValueError(f"--devices is {count}, expected 1 to {len(available)}, as many there are")
    return available[:count]


def _read_grids(path: Path) -> list[list]:
    try:
        return [np.array(grid, np.float64).tolist() for grid in read_json(path)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--point-grids {path} is no JSON list of lists of points [x, y]: {error}"
        ) from error


def evaluate(args: Evaluate) -> None:
    """Prints mean IoUs."""
    source = open_source(args.annotations, args.images, args.bad_annotations)
    model = from_pretrained(args.model, dtype=args.dtype)
    _say_compiling("the latter for several numbers of objects")
    with tqdm(total=len(source), unit="image", miniters=1) as bar:
        print(json.dumps(evaluate_model(model, source, on_image=bar.update), indent=2))


def export(args: Export) -> None:
    """Writes the folder; see `sam_jax.export`.

    Raises:
        OSError: for an output that exists or cannot be written.
        ValueError: for options that do not go together or that the model does not allow, an unknown
            model, and without the extra `onnx` where it is needed.
    """
    check_new(args.output)
    for_jax = args.platforms is not None or args.dtype != "float32" or args.gradient
    if args.format == "onnx" and for_jax:
        raise ValueError(
            "--platforms, --dtype and --gradient are for --format jax; ONNX is float32, without "
            "a gradient"
        )
    if args.format == "jax" and args.single_mask:
        raise ValueError("--single-mask is for --format onnx")
    model = from_pretrained(args.model, dtype=args.dtype)
    if args.format == "onnx":
        export_onnx(model, args.output, single_mask=args.single_mask)
    else:
        platforms = {} if args.platforms is None else {"platforms": args.platforms}
        export_jax(model, args.output, **platforms, vjp_order=int(args.gradient))
    print(args.output)


def demo(args: Demo) -> None:
    """Serves the page until it is interrupted; see `sam_jax.demo`.

    Raises:
        KeyboardInterrupt: when it is stopped.
        OSError: if the port is taken.
        ValueError: for invalid numbers, an unknown model, and without the extra `demo`.
    """
    try:
        from sam_jax.demo.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError(
            f"{error.name} is not installed; install sam_jax with its extra `demo`"
        ) from error
    serve(args.model, args.dtype, args.host, args.port, args.max_megabytes, args.allow_host)


def segment(args: Segment) -> None:
    """Writes overlay.png, a PNG for each mask and masks.json with their scores.

    Raises:
        OSError: for a picture that cannot be read, or a folder that cannot be written to.
        ValueError: for prompts that cannot be, an output with files of others' that have the same
            names, an unknown model.
    """
    points, labels = _parse_points(args.point)
    boxes = _parse_boxes(args.box)
    if len(points) == 0 and len(boxes) == 0:
        raise ValueError("nothing to segment: give at least one --point or --box")
    if len(points) and len(boxes) > 1:
        raise ValueError(
            f"--point goes together with one --box at the most, but there are {len(boxes)}"
        )
    image = load_image(args.image)
    _check_inside(points, "--point", image.shape[:2])
    _check_inside(boxes.reshape(-1, 2), "--box", image.shape[:2])
    output = args.output or Path(f"{args.image.stem}_masks")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output is {output}, a file; expected a folder")
    _check_free(output)

    predictor = SamPredictor(from_pretrained(args.model, dtype=args.dtype))
    _say_compiling()
    predictor.set_image(image)
    multimask = args.multimask
    if multimask is None:
        multimask = len(points) == 1 and len(boxes) == 0
    masks, scores, _ = predictor.predict_batch(
        points[None] if len(points) else None,
        labels[None] if len(points) else None,
        boxes if len(boxes) else None,
        multimask_output=multimask,
    )
    check_scores(scores)

    pictures, records = {}, []
    for prompt in range(len(masks)):
        for candidate in np.argsort(-scores[prompt]):
            mask, score = masks[prompt, candidate], float(scores[prompt, candidate])
            name = f"mask_{len(records)}.png"
            pictures[name] = Image.fromarray(mask)
            record = {"file": name, "predicted_iou": score, "area": int(mask.sum())}
            if len(boxes):
                record["box"] = boxes[prompt].tolist()
            records.append(record)
    best = [m[s.argmax()] for m, s in zip(masks, scores, strict=True)]
    pictures["overlay.png"] = overlay(image, best, points, labels, boxes)
    summary = {
        "image": str(args.image),
        "width": image.shape[1],
        "height": image.shape[0],
        "model": args.model,
        "points": [[*p, k] for p, k in zip(points.tolist(), labels.tolist(), strict=True)],
        "masks": records,
    }
    with lock_folder(output):
        _check_free(output)
        _write(output, pictures, summary)
    for record in records:
        print(f"{output / record['file']}  predicted IoU {record['predicted_iou']:.3f}")
    print(output / "overlay.png")


def _write(folder: Path, pictures: dict[str, Image.Image], summary: dict[str, Any]) -> None:
    """Writes all images under a hidden folder, then puts them in the place of an earlier run's.

    Whenever it is interrupted, masks.json tells of every file there that is ours.
    """
    with temporary_folder(folder) as temporary:
        for name, picture in pictures.items():
            picture.save(temporary / name)
        old = _files_of_earlier_run(folder)
        both = [{"file": name} for name in (*old, *pictures)]
        write_json(folder / "masks.json", {"masks": both})
        for name in pictures:
            os.replace(temporary / name, folder / name)
        for name in {*old} - {*pictures, "masks.json"}:
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "masks.json", summary, indent=2)


def _check_free(folder: Path) -> None:
    """Refuses a folder in which files of our names are somebody else's, the picture for one."""
    ours = _files_of_earlier_run(folder)
    for file in sorted(folder.glob("*")):
        name = file.name
        if name not in ours and re.fullmatch(r"mask_\d+\.png|overlay\.png|masks\.json", name):
            raise ValueError(
                f"{file} is not of an earlier run, and is not overwritten; choose another --output"
            )


def _files_of_earlier_run(folder: Path) -> list[str]:
    """What its masks.json tells of."""
    try:
        names = [record["file"] for record in read_json(folder / "masks.json")["masks"]]
        names = [name for name in names if re.fullmatch(r"mask_\d+\.png", name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [*names, "overlay.png", "masks.json"]


def _parse_points(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = [_parse_numbers(t, (2, 3), "--point", "X,Y or X,Y,LABEL") for t in texts]
    labels = [row[2] if len(row) == 3 else 1 for row in rows]
    if wrong := [x for x in labels if x not in (0, 1)]:
        raise ValueError(f"--point has label {wrong[0]:g}, expected 1 (on the object) or 0 (not)")
    return check_points([row[:2] for row in rows], labels, "--point")


def _parse_boxes(texts: list[str]) -> np.ndarray:
    return check_boxes([_parse_numbers(t, (4,), "--box", "X0,Y0,X1,Y1") for t in texts], "--box")


def _check_inside(coords: np.ndarray, option: str, size: tuple[int, int]) -> None:
    """Refuses coordinates [n, 2] outside an image of (h, w)."""
    height, width = size
    outside = ((coords < 0) | (coords > (width, height))).any(1)
    if outside.any():
        x, y = coords[outside][0]
        raise ValueError(
            f"{option} has ({x:g}, {y:g}), outside the image, which is {width} x {height} pixels; "
            f"expected x from 0 to {width} and y from 0 to {height}"
        )


def _parse_numbers(text: str, counts: tuple[int, ...], option: str, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not np.isfinite(numbers).all():
        raise ValueError(f"{option} is {text!r}, expected {form}")
    return numbers


_FUNCTIONS = {
    Segment: segment,
    Generate: generate,
    Evaluate: evaluate,
    Export: export,
    Demo: demo,
}
COMMANDS = {function.__name__: command for command, function in _FUNCTIONS.items()}


def main() -> None:
    """Runs the command; errors of the user go to stderr in one line, with exit code 1."""
    args = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="sam-jax", description="Segment Anything in JAX."
    )
    try:
        _FUNCTIONS[type(args)](args)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        sys.exit(f"sam-jax: {error}")
    except KeyboardInterrupt:
        print("sam-jax: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
