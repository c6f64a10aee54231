"""For mkdocs: links out of `docs/`, options of commands as `--help` lists them, and anchors."""

import contextlib
import importlib
import io
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import tyro

SCRIPTS = [str(Path(__file__).parents[1] / folder) for folder in ("examples", "convert")]
# Folders next to `docs/` whose pages are on the site, too; links are written as on GitHub.
LINKED = ("examples/", "benchmarks/")


def on_config(config) -> None:
    """Links to the repository that this clone came from, if it has an address on the web."""
    git = ["git", "-C", str(Path(__file__).parent), "remote", "get-url", "origin"]
    with contextlib.suppress(OSError):  # without git, there is no link
        origin = subprocess.run(git, capture_output=True, text=True, check=False).stdout
        if url := web_address(origin.strip()):
            config.repo_url, config.repo_name = url, "Repository"


def web_address(origin: str) -> str | None:
    """The page of a remote repository on the web, without a user's name or password in it."""
    start, host = r"(?:https?://(?:[^/@]+@)?|(?:ssh://)?git@)", r"([\w.-]+)(?::\d+(?=/))?"
    found = re.fullmatch(rf"{start}{host}[:/](.+?)(?:\.git)?", origin)
    return f"https://{found[1]}/{found[2]}" if found else None


def on_page_markdown(markdown: str, page, **_) -> str:
    """Replaces each `<!-- options of MODULE:CLASS as COMMAND -->`, and mends links."""
    if page.file.src_uri.startswith(LINKED):
        markdown = markdown.replace("](../docs/", "](../")
    else:
        markdown = re.sub(rf"\]\(\.\./((?:\.\./)*(?:{'|'.join(LINKED)}))", r"](\1", markdown)
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
    os.environ["COLUMNS"] = "1000"  # each option in a line, and its help from there on
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(config, prog=command, args=["--help"])
    return f"```text\n{tidy(printed.getvalue())}\n```"


def tidy(text: str) -> str:
    """Help of tyro in 80 columns, without the None of options that may be left out.

    tyro can hide it, but field by field (`help_behavior_hint` and `metavar`), and it breaks lines
    where docstrings do.
    """
    text = re.sub(r"\x1b\[[\d;]*m", "", text).strip()
    text = re.sub(r"^[│╭╰─ ]*[─-]{9,}.*\n?|│", "", text, flags=re.MULTILINE)
    description, *sections = re.split(
        r"^ ?((?:[\w-]+ )*(?:options|arguments)) *$", text, flags=re.M
    )
    lines = [_wrap(part) + "\n" for part in re.split(r"\n\s*\n", description.strip())]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines.append(f"{title.strip()}:")
        for entry in re.split(r"\n(?=  ?\S)", body.strip("\n")):
            option, _, explained = entry.strip().partition("  ")
            option = re.sub(r"\{None\}\|\{(.*)\}$|\{None\}\|(.*)$", r"\1\2", option)
            option = option.replace("{None,", "{")
            explained = re.sub(r"\(default:\s+(?:None)?\)", "", explained)
            explained = explained.replace("(default: ", "(default:\N{NO-BREAK SPACE}")
            lines.append(_wrap(f"  {option}", 8))
            lines.append(_wrap(explained, 8, " " * 8))
        lines.append("")
    return "\n".join(line for line in lines if line is not None).strip()


def _wrap(text: str, indent: int = 0, first: str | None = None) -> str | None:
    """In lines of up to 80 columns; None if there is no text."""
    start = first if first is not None else re.match(" *", text)[0]
    wrapped = textwrap.fill(
        re.sub(r"[ \n]+", " ", text.strip()),
        80,
        initial_indent=start,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped.replace("\N{NO-BREAK SPACE}", " ") or None
