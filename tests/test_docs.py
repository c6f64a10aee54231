"""What the pages of `docs/` tell to do, done."""

import dataclasses
import importlib
import math
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
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
# Shapes do not tell the number of the decoder's heads: 8.
SMALL_VIT = dataclasses.replace(
    SHALLOW, mask_decoder=dataclasses.replace(SHALLOW.mask_decoder, num_heads=8)
)
WITH_BASH = [
    page
    for page in (*PAGES, ROOT / "README.md", ROOT / "examples" / "README.md")
    if "```bash" in page.read_text()
]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With photos, and a small model that stands for MedSAM."""
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
    """All of a page in one session, as one reads; everything-mode with few points."""
    code = "\n".join(blocks(page.read_text(), "python"))
    code = re.sub(r"(points_per_(?:side|crop))=8", r"\1=3", code)
    if "optimizer" in code:  # compiling which takes longer than running it
        jax.config.update("jax_disable_most_optimizations", True)
    if "cells/" in code:
        command = [sys.executable, ROOT / "examples" / "cells.py", "--output", "cells"]
        subprocess.run([*command, "--train", "2", "--test", "1"], check=True)
    exec(compile(code, page.name, "exec"), {})


@pytest.fixture
def small(folder, monkeypatch):
    """A small model that stands for MobileSAM and ViT-B, and three pictures with annotations."""
    resolve = sam_jax.checkpoints.resolve
    weights = (folder / "medsam_vit_b.pth").rename(folder / "sam_vit_b_01ec64.pth")
    names = {"mobile_sam": weights}
    monkeypatch.setattr(
        sam_jax.checkpoints, "resolve", lambda name: names.get(name) or resolve(name)
    )
    monkeypatch.syspath_prepend(ROOT / "convert")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import cells

    cells.main(cells.Config(Path("made"), train=2, test=1))
    shutil.move("made/images", "photos")
    for name in ("train", "test", "held_out", "coco"):
        shutil.copy("made/train.json", f"{name}.json")
    return folder


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("page", WITH_BASH, ids=lambda page: str(page.relative_to(ROOT)))
def test_bash(page, monkeypatch):
    """All commands of a page in their order; two steps of training, and few points of everything.

    Other programs' are left out. Those that need other machines, and the one that runs until it is
    stopped, are only looked at: their arguments are what they take.
    """
    text = "\n".join(blocks(page.read_text(), "bash")).replace("\\\n", " ")
    if "run/model" in text and "finetune.py" not in text:
        sam_jax.save_pretrained(sam_jax.from_pretrained("mobile_sam"), Path("run", "model"))
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
    """Every option that a text names is one of a command's (or, where listed here, another's)."""
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


def test_parameters_of_each_part():
    """The table of docs/checkpoints.md."""
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
    """What CONTRIBUTING names is there. Its commands are a fresh clone's, and the whole suite."""
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
