"""For mkdocs: options as the commands' parsers print them, and a check of anchors in notebooks."""

import contextlib
import importlib
import io
import logging
import os
import re
import sys
from pathlib import Path

import tyro

SCRIPTS = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "convert")]


def on_page_markdown(markdown: str, **_) -> str:
    """Replaces each `<!-- options of MODULE:CLASS as COMMAND -->`."""
    return re.sub(r"<!-- options of (\S+):(\S+) as (.+) -->", _options, markdown)


def on_post_page(output: str, page, **_) -> None:
    """Warns of links within a notebook to no place on it, which MkDocs does not check."""
    if page.file.src_uri.endswith(".ipynb"):
        ids = set(re.findall(r'\bid="([^"]+)"', output))
        for anchor in sorted(set(re.findall(r'\bhref="#([^"]+)"', output)) - ids):
            logging.getLogger("mkdocs").warning(
                "%s links to #%s, which is not on the page", page.file.src_uri, anchor
            )


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
