"""What several commands share."""

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """To the person who waits, and not to a program that reads the output."""
    tqdm.write(text, sys.stderr)
    sys.stderr.flush()


def say_compiling(how_often: str = "once") -> None:
    """Says what the first seconds are spent on."""
    say(f"compiling the image encoder and the mask decoder, {how_often} ...")
