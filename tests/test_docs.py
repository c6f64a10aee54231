"""What the pages of `docs/` tell to do, done."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
import torch
import tyro
from PIL import Image
from reference import SMALL, meta_sam

from sam_jax.cli import COMMANDS

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
    SMALL, mask_decoder=dataclasses.replace(SMALL.mask_decoder, num_heads=8)
)
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a photo, and a small model that stands for MedSAM."""
    photo = Image.fromarray(skimage.data.coffee()).resize((1800, 1200))
    photo.save(tmp_path / "photo.jpg")
    torch.save(meta_sam(SMALL_VIT).state_dict(), tmp_path / "medsam_vit_b.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("mobile_sam_file")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python(page, folder):
    """All of a page in one session, as one reads."""
    code = "\n".join(blocks(page.read_text(), "python"))
    if "cells/" in code:
        command = [sys.executable, ROOT / "examples" / "cells.py", "--output", "cells"]
        subprocess.run([*command, "--train", "2", "--test", "1"], check=True)
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "examples" / "README.md"])
def test_commands(page, monkeypatch):
    """Commands have the arguments that a page gives them."""
    text = "\n".join(blocks(page.read_text(), "bash")).replace("\\\n", " ")
    for command in re.split(r"\n|&&", text):
        program, *arguments = shlex.split(command, comments=True) or [""]
        if program.endswith("sam-jax"):
            tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments)
        elif program.endswith("python") and arguments[0].endswith(".py"):
            script, *arguments = arguments
            assert (ROOT / script).is_file()
            if script not in SCRIPTS or "..." in arguments:
                continue
            monkeypatch.syspath_prepend((ROOT / script).parent)
            module = importlib.import_module(Path(script).stem)
            tyro.cli(getattr(module, SCRIPTS[script]), args=arguments)


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
