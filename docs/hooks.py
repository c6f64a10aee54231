"""For mkdocs: what the commands' parsers say of their options, in the page that asks for it."""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path

import tyro

SCRIPTS = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "convert")]


def on_page_markdown(markdown: str, **_) -> str:
    """Replaces each `<!-- options of MODULE:CLASS as COMMAND -->`."""
    return re.sub(r"<!-- options of (\S+):(\S+) as (.+) -->", _options, markdown)


def _options(found: re.Match) -> str:
    module, name, command = found.groups()
    sys.path.extend(folder for folder in SCRIPTS if folder not in sys.path)
    config, printed = getattr(importlib.import_module(module), name), io.StringIO()
    os.environ["COLUMNS"] = "90"
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(config, prog=command, args=["--help"])
    text = re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue()).strip()
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"```text\n{lines}\n```"
