"""The model that is exported, and the command that does it."""

import dataclasses
import sys

from reference import SHALLOW, SMALL

from sam_jax import cli

# Both kinds of the encoder's blocks, one of the decoder's.
CONFIG = dataclasses.replace(SMALL, mask_decoder=SHALLOW.mask_decoder)


def run_command(*arguments):
    before, sys.argv = sys.argv, ["sam-jax", *map(str, arguments)]
    try:
        cli.main()
    finally:
        sys.argv = before
