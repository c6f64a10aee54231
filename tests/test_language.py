"""The documentation, docstrings, comments and messages are in plain English."""

import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Phrases, in lower case, and what to write instead.
BANNED = {
    r"by chance": "at random",
    r"anew": "again",
    r"besides?": "next to, in addition to, except for",
    r"pictures?": "image",
    r"prepared": "preprocessed, or the exact verb",
    r"whoever": "callers that, everyone who",
    r"for what (is|are|cannot)": "if X is not",
    r"what (is|are) no": "if X is not",
    r"(?<!there )(is|are|was|were) no (?!longer|more|less|good)[a-z]+": "is not a, does not have",
    r"gains? .* by": "saves, is faster by",
    r"everything-mode(?!\.md)": "everything mode",
    r"surface of": "API of",
    r"(goes|go|went) on": "resumes, continues",
    r"pass(es|ed) over": "skips",
    r"look(s|ed)? at": "reads, considers, checks",
    r"in the place of": "instead of",
    r"normalis\w+": "normalize",
    r"optimis(e|ation|ing)\w*": "optimize",
    r"labelled": "labeled",
    r"colours?": "color",
    r"neighbours?": "neighbor",
    r"centres?": "center",
}
_PHRASES = {re.compile(rf"\b{phrase}\b"): better for phrase, better in BANNED.items()}


def prose(path: Path) -> list[tuple[int, str]]:
    """The lines of a text, or of a module's names, strings and comments, with their numbers."""
    text = path.read_text()
    if path.suffix != ".py":
        return list(enumerate(text.splitlines(), start=1))
    return [
        (token.start[0] + i, line.replace("_", " ") if token.type == tokenize.NAME else line)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type in (tokenize.COMMENT, tokenize.STRING, tokenize.NAME)
        for i, line in enumerate(token.string.splitlines())
    ]


def test_plain_english():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    pages += [*ROOT.glob("*.toml"), *ROOT.glob("*.yml"), ROOT / ".ci" / "run"]
    folders = ("sam_jax", "convert", "examples", "benchmarks", "tests", "docs")
    suffixes = {".py", ".pyi", ".js", ".css", ".html", ".sh"}
    files = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    found = []
    for path in {*pages, *(file for file in files if file.suffix in suffixes)} - {Path(__file__)}:
        text = path.read_text().lower()
        if phrases := [p for p in _PHRASES if p.search(text) or p.search(text.replace("_", " "))]:
            found += [
                f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write: {_PHRASES[phrase]}"
                for line, text in prose(path)
                for phrase in phrases
                for match in phrase.finditer(text.lower())
            ]
    assert not found, "\n".join(["these phrases are not plain English:", *sorted(found)])
