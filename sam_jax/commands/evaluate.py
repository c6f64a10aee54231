"""`sam-jax evaluate`."""

import dataclasses
import json
from pathlib import Path

import tyro
from tqdm import tqdm

from sam_jax.commands.common import IfGiven, ModelOptions, load_model, say_compiling
from sam_jax.types import OnBadAnnotation


@dataclasses.dataclass(frozen=True)
class Evaluate(ModelOptions):
    """Compare masks with annotated objects, for 1, 2, 3 and 5 clicks and a box.

    Prints mean IoUs over all objects as JSON; see `sam_jax.evaluation`.
    """

    annotations: tyro.conf.Positional[Path]
    """A COCO instance file, or a folder of SA-1B."""
    images: IfGiven[Path] = None
    """Folder of the COCO file's images."""
    on_bad_annotation: OnBadAnnotation = "raise"
    """raise: list what is wrong with the annotations and stop; skip: leave bad annotations out."""


def evaluate(args: Evaluate) -> None:
    """Prints mean IoUs as JSON."""
    from sam_jax.evaluation.clicks import evaluate as evaluate_model
    from sam_jax.training.datasets import open_annotations

    dataset = open_annotations(
        args.annotations, args.images, on_bad_annotation=args.on_bad_annotation
    )
    model = load_model(args.model, args.dtype)
    say_compiling("the decoder once per number of objects")
    with tqdm(total=len(dataset), unit="image", miniters=1) as bar:
        found = evaluate_model(model, dataset, runtime=args.runtime, on_image=bar.update)
    print(json.dumps(found, indent=2))
