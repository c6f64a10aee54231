"""Runs the code and the commands of the pages in `docs/`."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import shlex
import shutil
import sys
import tomllib
import types
from pathlib import Path

import jax
import pytest
import skimage.data
import torch
import tyro
from flax import nnx
from PIL import Image
from reference import SHALLOW, meta_sam

import sam_jax
from sam_jax.cli import COMMANDS, main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = {
    "examples/cells.py": "Config",
    "examples/finetune.py": "Config",
    "convert/flax_to_torch.py": "Args",
    "convert/torch_to_flax.py": "Args",
}
# Shapes do not determine the decoder's number of heads; sam_jax assumes 8.
SMALL_VIT = dataclasses.replace(
    SHALLOW, mask_decoder=dataclasses.replace(SHALLOW.mask_decoder, num_heads=8)
)
WITH_BASH = [
    page
    for page in (*PAGES, ROOT / "README.md", ROOT / "examples" / "README.md")
    if "```bash" in page.read_text()
]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]
COMPILE_LONGER_THAN_RUN = ("fine-tuning", "research")  # since they train


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with photos, and a small model that stands in for MedSAM."""
    monkeypatch.syspath_prepend(ROOT / "convert")
    monkeypatch.syspath_prepend(ROOT / "examples")
    photo = Image.fromarray(skimage.data.coffee()).resize((1800, 1200))
    photo.save(tmp_path / "photo.jpg")
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "astronaut.png")
    torch.save(meta_sam(SMALL_VIT).state_dict(), tmp_path / "medsam_vit_b.pth")
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "predictor.jpg", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("mobile_sam_file")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python(page, folder):
    """Runs a page's code in one session, in order, with few points in everything mode.

    It may use the images that `examples/cells.py` makes.
    """
    code = "\n".join(blocks(page.read_text(), "python"))
    code = re.sub(r"(points_per_(?:side|crop))=8", r"\1=3", code)
    if page.stem in COMPILE_LONGER_THAN_RUN:
        jax.config.update("jax_disable_most_optimizations", True)
    import cells

    cells.main(cells.Config(Path("cells"), train=2, test=1))
    exec(compile(code, page.name, "exec"), {})


@pytest.fixture
def small(folder, monkeypatch):
    """A small model that stands in for MobileSAM, ViT-B and a tuned one; three annotated images."""
    resolve = sam_jax.checkpoints.resolve
    weights = (folder / "medsam_vit_b.pth").rename(folder / "sam_vit_b_01ec64.pth")
    names = {"mobile_sam": weights}
    monkeypatch.setattr(
        sam_jax.checkpoints, "resolve", lambda name: names.get(name) or resolve(name)
    )
    sam_jax.save_pretrained(sam_jax.from_pretrained(weights), "tuned")
    import cells

    cells.main(cells.Config(Path("made"), train=2, test=1))
    shutil.move("made/images", "photos")
    for name in ("train", "test", "held_out", "coco"):
        shutil.copy("made/train.json", f"{name}.json")
    return folder


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("page", WITH_BASH, ids=lambda page: str(page.relative_to(ROOT)))
def test_bash(page, monkeypatch):
    """Runs a page's commands in order, with two training steps and few points of everything mode.

    Commands of other programs are skipped. Commands that need other machines, and the one that runs
    until it is stopped, are only parsed: their arguments must be valid.
    """
    text = "\n".join(blocks(page.read_text(), "bash")).replace("\\\n", " ")
    for command in re.split(r"\n|&&", text):
        program, *arguments = shlex.split(command, comments=True) or [""]
        if program.endswith("sam-jax"):
            args = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments)
            if arguments[0] != "demo" and "--ray" not in arguments:
                few = ["--points-per-side", "4"] if arguments[0] == "generate" else []
                monkeypatch.setattr(sys, "argv", [program, *arguments, *few])
                main()
        elif program.endswith("python") and arguments[0].endswith(".py"):
            script, *arguments = arguments
            assert (ROOT / script).is_file()
            if "..." in arguments or script == "examples/quickstart.py":  # run by test_readme
                continue
            module = importlib.import_module(Path(script).stem)
            if script not in SCRIPTS:
                module.main(*arguments)
                continue
            args = tyro.cli(getattr(module, SCRIPTS[script]), args=arguments)
            fewer = {
                "examples/finetune.py": {"steps": 2, "batch_size": 2, "max_objects": 2},
                "examples/cells.py": {"train": 2, "test": 1},
            }
            args = dataclasses.replace(args, **fewer.get(script, {}))
            if getattr(args, "hosts", None) is None:
                module.main(args)


def test_options(capsys):
    """Every option that a page names belongs to a command (or to a program listed here)."""
    others = {"--return-single-mask", "--input"}
    known = set(others)
    sys.path.extend(str(ROOT / folder) for folder in ("examples", "convert"))
    scripts = (
        getattr(importlib.import_module(Path(script).stem), name)
        for script, name in SCRIPTS.items()
    )
    for config in (*COMMANDS.values(), *scripts):
        with pytest.raises(SystemExit):
            tyro.cli(config, args=["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for page in (*PAGES, ROOT / "README.md", ROOT / "examples" / "README.md"):
        text = "".join(re.findall(r"`[^`\n]+`", page.read_text()))
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known, page


def public(module=sam_jax, path="sam_jax"):
    """Paths and values of the names in `__all__`, and of those in its modules' `__all__`."""
    for name in module.__all__:
        value, inner = getattr(module, name), f"{path}.{name}"
        if isinstance(value, types.ModuleType):
            yield from public(value, inner)
        elif name != "__version__":
            yield inner, value


def test_reference_lists_exactly_the_public_names():
    """Each public name is listed once, by the shortest import path."""
    shortest = {}
    for path, value in public():
        known = shortest.setdefault(id(value), path)
        shortest[id(value)] = min(known, path, key=lambda path: path.count("."))
    pages = (ROOT / "docs" / "api").glob("*.md")
    documented = [
        name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
    ]
    assert sorted(documented) == sorted(shortest.values())


def test_pages_and_examples_import_public_names():
    """Pages and examples do not import internal names."""
    names = {path for path, _ in public()}
    known = names | {name.rpartition(".")[0] for name in names}
    pages = (*PAGES, *(ROOT / "docs").glob("design/*.md"), ROOT / "README.md")
    programs = [(page, block) for page in pages for block in blocks(page.read_text(), "python")]
    programs += [(file, file.read_text()) for file in (ROOT / "examples").glob("*.py")]
    for file in (ROOT / "examples").glob("*.ipynb"):
        cells = (c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code")
        programs += [(file, re.sub("(?m)^[!%]", "#", "".join(c["source"]))) for c in cells]
    for where, program in programs:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            ours = {name for name in imported if name.split(".")[0] == "sam_jax"}
            assert ours <= known, where
    for page in pages:
        # Names in the text, such as `sam_jax.training.add_lora`.
        for name in re.findall(r"`(sam_jax(?:\.\w+)+)\b", page.read_text()):
            assert name in known, f"{page}: {name}"


def test_links_between_folders():
    """Links out of `docs/` work on GitHub and, by `docs/hooks.py`, on the site."""
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")]
    for page in pages:
        for path in re.findall(r"\]\((\.\./[^)#]+)", page.read_text()):
            assert (page.parent / path).exists(), f"{page}: {path}"
        assert not re.search(r"\]\((?:examples|benchmarks)/", page.read_text()), page


def test_pages_say_what_they_are_for():
    """The first sentence says so. The site's navigation lists every page."""
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = [*PAGES, *(ROOT / "docs").glob("*/*.md")]
    for page in pages:
        name = str(page.relative_to(ROOT / "docs"))
        assert f": {name}\n" in nav, name
        title, _, sentence, *_ = page.read_text().splitlines()
        assert title.startswith("# "), name
        assert sentence.startswith("This page "), name


def load_hooks() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://example.org/team/sam_jax.git", "https://example.org/team/sam_jax"),
        ("https://name:token@example.org/sam_jax", "https://example.org/sam_jax"),
        ("git@example.org:team/sam_jax.git", "https://example.org/team/sam_jax"),
        ("ssh://git@example.org:2222/sam_jax.git", "https://example.org/sam_jax"),
        ("/srv/git/sam_jax.git", None),
        ("../folder.d/sam_jax", None),
        ("", None),
    ],
)
def test_link_to_the_repository(origin, address):
    """The link leads to the clone's origin, without a token that its address may have."""
    assert load_hooks().web_address(origin) == address


def test_help_on_the_site():
    """The page has every option of the parser, in 80 columns, and no None."""
    hooks = load_hooks()
    text = (ROOT / "docs" / "commands.md").read_text()
    markers = re.findall(r"<!-- options of (\S+):(\S+) as .+ -->", text)
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="commands.md"))
    shown = blocks(hooks.on_page_markdown(text, page), "text")
    assert len(shown) == len(markers) == 8
    for help_text, (module, name) in zip(shown, markers, strict=True):
        assert max(map(len, help_text.splitlines())) <= 80
        assert "None)" not in help_text
        assert "{None" not in help_text
        config = getattr(importlib.import_module(module), name)
        for field in dataclasses.fields(config):
            option = field.name.replace("_", "-")
            nested = dataclasses.is_dataclass(field.type) or field.name in ("training", "optimizer")
            if not nested and "Suppress" not in str(field.type):
                assert re.search(rf"--{option}\b|^  \S*(?:PATH|STR)\b", help_text, re.MULTILINE)


def test_parameters_of_each_part():
    """Checks the table in docs/checkpoints.md."""
    names = {"MobileSAM": "mobile_sam", "LiteMedSAM": "lite_medsam"}
    names |= {f"SAM ViT-{size}": f"vit_{size.lower()}" for size in "BLH"}
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    for title, name in names.items():
        (row,) = re.findall(rf"^\| {title} \| ([\d, |]+) \|$", text, re.MULTILINE)
        config = getattr(sam_jax.config, name)()
        model = nnx.eval_shape(lambda config=config: sam_jax.Sam(config, rngs=nnx.Rngs(0)))
        parts = model.image_encoder, model.prompt_encoder, model.mask_decoder, model
        counts = [
            sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(part, nnx.Param)))
            for part in parts
        ]
        assert [int(n.replace(",", "")) for n in row.split(" | ")] == counts


def test_contributing():
    """Everything that CONTRIBUTING names exists.

    Its commands are not run: they need a fresh clone and the whole suite.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"(?<![\w/.-])(?:\.?\w[\w-]*/)+[\w.-]*\w", text))
    modules = set(re.findall(r"`(\w+\.py|\w+/)`", text))
    assert len(paths) > 5
    assert len(modules) > 2
    for name in (paths | modules) - {".venv/bin/activate"}:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "sam_jax")), name
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r'pip install -e "\.\[(\w+)\]"', text)
    assert extras
    assert set(extras) <= set(options["optional-dependencies"])
