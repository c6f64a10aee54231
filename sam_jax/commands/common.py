"""Helpers of several commands."""

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Prints to stderr: to the user, not to programs that read the output."""
    tqdm.write(text, sys.stderr)
    sys.stderr.flush()


def say_compiling(how_often: str = "once") -> None:
    """Tells the user why the first seconds pass without results."""
    say(f"compiling the image encoder and the mask decoder, {how_often} ...")
