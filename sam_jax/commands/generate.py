"""`sam-jax generate`."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.commands.common import IfGiven, ModelOptions, load_model, say, say_compiling
from sam_jax.files import read_json
from sam_jax.runs import lock_folder
from sam_jax.types import OutputMode, ResultsFormat, Segmentation


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions, MaskGenerationOptions):
    """Find the masks of everything in images (automatic mask generation).

    Rerun the same command to resume: images that have a result are skipped.
    """

    input: tyro.conf.Positional[tuple[Path, ...]]
    """Images, and folders of images without their subfolders."""
    output: Path
    """Folder for the results."""
    format: ResultsFormat = "png"
    """png: for each image a folder of PNG masks with metadata.csv; coco: one annotations.json in
    COCO's format for all results in the output folder."""
    segmentation: Segmentation = "rle"
    """Form of the masks in annotations.json: run lengths, or polygons (about five times as large)
    for programs that read nothing else. It applies to all results in the folder."""
    overlays: bool = False
    """Also save each image with its masks drawn on it."""
    devices: IfGiven[int] = None
    """Number of this machine's devices to use, one image on each; all if left out."""
    ray: IfGiven[tuple[str, ...]] = None
    """Run on a Ray cluster: the one at this address; without an address, one that runs on this
    machine or else a new one. All machines must see the same folders."""
    points_per_side: IfGiven[int] = None
    """Points along one side of the image, 32 if left out; the grid has as many squared."""
    # A file here; `options` reads it.
    point_grids: IfGiven[Path] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """JSON file with a list of points [x, y], from 0 to 1, for the image and for each crop layer;
    instead of points_per_side."""
    output_mode: tyro.conf.Suppress[OutputMode] = "uncompressed_rle"

    def __post_init__(self):
        """Checks nothing; `options` does."""

    def options(self) -> MaskGenerationOptions:
        """The options, with the point grids of the file.

        Raises:
            ValueError: for an invalid option.
        """
        options = {f.name: getattr(self, f.name) for f in fields(MaskGenerationOptions)}
        if self.point_grids is not None:
            options["point_grids"] = _read_grids(self.point_grids)
        elif self.points_per_side is None:
            options["points_per_side"] = 32
        return MaskGenerationOptions(**options)


def generate(args: Generate) -> None:
    """Writes the results of all images; see `sam_jax.automatic`.

    Raises:
        OSError: if a path does not exist, the output cannot be written to, or the disk is full.
        ValueError: if options are invalid or contradict each other, if the output has results of
            different settings, if the model is unknown, if another run works in the folder, and,
            after all other images, if images cannot be read or written; the message names them.
    """
    from sam_jax.automatic.folder import find_images, skipped
    from sam_jax.automatic.results import Results
    from sam_jax.checkpoints.download import MODELS, resolve

    files = find_images(args.input)
    if any(os.path.realpath(path) == os.path.realpath(args.output) for path in args.input):
        raise ValueError(f"--output {args.output} is also an input; choose another folder")
    if args.segmentation == "polygons" and args.format != "coco":
        raise ValueError("--segmentation polygons is for --format coco")
    if args.ray is not None and len(args.ray) > 1:
        raise ValueError(f"--ray is {' '.join(args.ray)!r}, expected one address or none")
    if args.ray is not None and args.devices is not None:
        raise ValueError("--devices is for this machine; it cannot be given with --ray")
    options = args.options()
    model = args.model
    if model not in MODELS and Path(model).exists():
        model = str(Path(model).resolve())
    results = Results(args.output, args.format, args.overlays, args.segmentation)
    # What determines the masks: all results in a folder must have the same settings.
    settings = {"model": model, "dtype": args.dtype, **vars(options)}
    del settings["points_per_batch"], settings["output_mode"]
    # Left out at its default, so that folders of earlier versions can be resumed.
    if not options.hierarchical:
        del settings["hierarchical"]
    if args.runtime != "jax":
        settings["runtime"] = args.runtime

    failures: list[str] = []
    devices = []
    if args.ray is None:  # whose workers have their own
        devices = _devices(args.devices)
        resolve(model)
    with lock_folder(args.output):
        todo = results.begin(settings, files)
        for line in skipped(args.input, args.output):
            say(line)
        if todo:
            _say_what_crops_take(options.grids())
        try:
            if todo:
                _generate(args, model, options, devices, results, todo, len(files), failures)
        except BaseException:
            print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr)
            raise
        joined = results.finish()
    print(f"{len(files) - len(failures)} of {len(files)} images in {args.output}")
    if joined:
        print(joined[0])
    for line in joined[1:]:
        say(line)
    if failures:
        what = "1 image" if len(failures) == 1 else f"{len(failures)} images"
        raise ValueError("\n".join([f"{what} failed:", *failures]))


def _generate(args, model, options, devices, results, todo, total, failures) -> None:
    from jax.sharding import Mesh

    from sam_jax.automatic.folder import generate_folder
    from sam_jax.automatic.generator import SamAutomaticMaskGenerator
    from sam_jax.automatic.ray_cluster import generate_with_ray

    done, start, bars = total - len(todo), time.monotonic(), []

    def on_image() -> None:
        if bars:
            bars[0].update()
            return
        # The bar starts here, so that its rate excludes compilation.
        say(f"the first image took {time.monotonic() - start:.1f} s")
        bar = tqdm(total=total, initial=done + 1, unit="image", miniters=1)
        bars.append(stack.enter_context(bar))

    def on_failure(file: Path, problem: str) -> None:
        failures.append(f"  {file}: {problem}")

    with contextlib.ExitStack() as stack:
        if args.ray is not None:
            say("starting workers; each compiles the image encoder and the mask decoder ...")
            address = args.ray[0] if args.ray else None
            generate_with_ray(
                address,
                *(model, args.dtype, options, todo, results, on_image, on_failure),
                runtime=args.runtime,
            )
        else:
            mesh = Mesh(np.array(devices), ("images",))
            sam = load_model(model, args.dtype)
            generator = SamAutomaticMaskGenerator(
                sam, **vars(options), mesh=mesh, runtime=args.runtime
            )
            say_compiling("once for all images")
            generate_folder(generator, todo, results, on_image, on_failure)


def _say_what_crops_take(grids: list[np.ndarray]) -> None:
    crops = [4**layer for layer in range(len(grids))]
    points = [count * len(grid) for count, grid in zip(crops, grids, strict=True)]
    if len(crops) > 1:
        low, high = sorted((sum(points) / len(grids[0]), float(sum(crops))))
        times = f"{high:.0f}" if round(low) == round(high) else f"{low:.1f} to {high:.0f}"
        say(
            f"{sum(crops) - 1} crops per image: the encoder runs {sum(crops)} times instead of "
            f"once, and {sum(points)} points are decoded instead of {points[0]}; expect {times} "
            "times the run time without crops"
        )


def _devices(count: int | None) -> list:
    """The first `count` devices of this machine, or all."""
    import jax

    available = jax.local_devices()
    count = len(available) if count is None else count
    if not 1 <= count <= len(available):
        raise ValueError(
            f"--devices is {count}, but this machine has {len(available)} "
            f"device{'s' * (len(available) > 1)}"
        )
    return available[:count]


def _read_grids(path: Path) -> list[list]:
    try:
        return [np.array(grid, np.float64).tolist() for grid in read_json(path)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--point-grids {path} is not a JSON list of lists of points [x, y]: {error}"
        ) from error
