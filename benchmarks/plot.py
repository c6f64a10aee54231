"""Draws the newest results: run times of Meta's code, of torch.compile, and of sam_jax.

    python -m benchmarks.plot

Reads the newest file of `benchmarks/results/` with all rows of `WHAT`, writes
`docs/performance.svg`, and prints the table of `docs/performance.md`.
"""

import argparse
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.common import RESULTS

OUTPUT = Path(__file__).parents[1] / "docs" / "performance.svg"
WHAT = {  # by the first column of `benchmarks.run`
    "mobile_sam, predict": "click on a new image, MobileSAM",
    "mobile_sam, decoder": "64 prompts on one image, MobileSAM",
    "mobile_sam, everything": "everything mode, MobileSAM, 600 x 400",
    "vit_b, encoder": "image encoder, ViT-B",
    "vit_b, training": "training step, ViT-B",
}
WHO = {  # by the second column
    "Meta": "Meta's code, PyTorch",
    "Meta, torch.compile": "with torch.compile",
    "ours": "sam_jax",
}
COLORS = ("#b0bec5", "#78909c", "#3f51b5")


def read(path: Path) -> dict[tuple[str, str], float]:
    """Seconds by part and contender; if rows are repeated, the last one counts."""
    rows = re.findall(
        r"^\| (\w+, \w+) \| ([^|]+) \| [^|]+ \| ([\d.]+) (m?s) \|", path.read_text(), re.MULTILINE
    )
    return {(what, who): float(n) / (1e3 if u == "ms" else 1) for what, who, n, u in rows}


def newest(folder: Path = RESULTS) -> tuple[Path, dict[tuple[str, str], float]]:
    """The newest complete results file, and its seconds."""
    for path in sorted(folder.glob("*.md"), reverse=True):
        found = read(path)
        if all((what, who) in found for what in WHAT for who in WHO):
            return path, found
    raise SystemExit(f"no file in {folder} has all of: {'; '.join(WHAT)}")


def rounded(seconds: float) -> str:
    """Formats seconds with three digits or two decimals."""
    return f"{seconds:.{0 if seconds >= 100 else 1 if seconds >= 10 else 2}f}"


def table(found: dict[tuple[str, str], float]) -> str:
    """The table in Markdown, with sam_jax's times in bold."""
    lines = [f"| seconds | {' | '.join(WHO.values())} |", f"|---|{'---:|' * len(WHO)}"]
    for what, title in WHAT.items():
        *theirs, ours = (rounded(found[what, who]) for who in WHO)
        lines.append(f"| {title} | {' | '.join(theirs)} | **{ours}** |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], float], path: Path) -> None:
    """Draws each contender's share of the time of Meta's code as bars, labeled with seconds."""
    matplotlib.rcParams.update({"svg.hashsalt": "sam_jax", "font.size": 9})
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, (who, label) in enumerate(WHO.items()):
        shares = [found[what, who] / found[what, "Meta"] for what in WHAT]
        places = [row + 0.27 * (number - 1) for row in range(len(WHAT))]
        bars = axes.barh(places, shares, 0.25, label=label, color=COLORS[number])
        axes.bar_label(
            bars, [f"{rounded(found[what, who])} s" for what in WHAT], padding=3, fontsize=8
        )
    axes.set_yticks(range(len(WHAT)), WHAT.values())
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("time, as a share of Meta's code (shorter is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    path, found = newest()
    draw(found, OUTPUT)
    print(f"{path.name}\n\n{table(found)}")


if __name__ == "__main__":
    main()
