"""Structure: imports point one way and are light, files are short, and arguments have names."""

import ast
import importlib
import inspect
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import get_origin

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sam_jax"
# A part of sam_jax (a module or subpackage) imports only from parts in earlier rows.
ROWS = (
    ("errors", "files", "idioms", "decoders", "types"),
    ("config", "arrays", "runs", "compilation_cache"),
    ("ops",),
    ("models",),
    ("image", "checkpoints"),
    ("validation",),
    ("processing", "export"),
    ("predictor", "visualize"),
    ("automatic", "training"),
    ("evaluation",),
    ("demo",),
    ("commands",),
    ("cli",),
)
ROW = {part: number for number, row in enumerate(ROWS) for part in row}


def imports(path):
    """The sam_jax modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def name_of(path):
    parts = ("sam_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {name_of(path): path for path in FILES}


def part_of(module):
    return module.split(".")[1]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "sam_jax"])
def test_imports_point_down(name):
    for other in imports(MODULES[name]):
        if other != "sam_jax" and part_of(other) != part_of(name):
            assert ROW[part_of(other)] < ROW[part_of(name)], f"{name} imports {other}"


def test_no_import_cycles():
    graph = {name: set(imports(path)) - {"sam_jax"} for name, path in MODULES.items()}
    # A module may import from its own package, which is initialized first.
    for name, others in graph.items():
        graph[name] = {other for other in others if not f"{name}.".startswith(f"{other}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_no_file_is_long():
    folders = "sam_jax", "tests", "examples", "benchmarks", "convert", "docs"
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: count for name, count in lines.items() if count >= 450} == {}


@pytest.mark.parametrize("program", ["import sam_jax", "import sam_jax.cli"])
def test_package_and_help_do_not_import_jax(program):
    """PEP 562: a public name is imported when it is first used."""
    check = f"import sys; {program}; sys.exit(1 if 'jax' in sys.modules else 0)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_public_names():
    import sam_jax

    for name in sam_jax.__all__:
        assert getattr(sam_jax, name) is not None
    assert set(sam_jax.__all__) <= set(dir(sam_jax))
    with pytest.raises(AttributeError, match="nothing"):
        sam_jax.nothing  # noqa: B018


# Exceptions: arguments of Meta's and Hugging Face's APIs, and arrays that `jax.jit`, `jax.grad` and
# `jax.vmap` refer to by position.
POSITIONAL = {
    *("Sam.decode", "Sam.decoder_attention", "SamPredictor.predict", "SamPredictor.predict_torch"),
    *("SamProcessor.__call__", "SamProcessor.post_process_masks", "SamAutomaticMaskGenerator"),
    *("MaskGenerationOptions", "show_points", "join_prompts", "batch_losses"),
    *("interactive_losses", "train_step", "rel_pos_attention", "attention_weights"),
    *("generate_crop_boxes", "resize_masks"),
}
PUBLIC = ("", ".training", ".training.sharding", ".training.checkpointing", ".checkpoints")
PUBLIC += (".config", ".runs", ".ops", ".automatic", ".evaluation", ".export", ".visualize")


def public_callables():
    """Public functions, classes and methods, by name."""
    for place in PUBLIC:
        module = importlib.import_module(f"sam_jax{place}")
        names = getattr(module, "__all__", None)
        for name in names or [n for n in vars(module) if n[0] != "_"]:
            value = getattr(module, name)
            is_own = names or getattr(value, "__module__", "") == module.__name__
            is_data = hasattr(value, "_fields") or get_origin(value) is not None
            is_builtin = inspect.isclass(value) and issubclass(value, (Exception, dict))
            if not callable(value) or not is_own or is_data or is_builtin:
                continue
            yield name, value
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                if inspect.isfunction(function) and (method[0] != "_" or method == "__call__"):
                    yield f"{name}.{method}", function


def test_at_most_two_arguments_are_positional():
    found = set()
    for name, value in public_callables():
        kinds = [p.kind for n, p in inspect.signature(value).parameters.items() if n != "self"]
        if kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) > 2:
            found.add(name)
    assert found == POSITIONAL
