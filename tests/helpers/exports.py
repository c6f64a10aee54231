"""The model to export, and the export command."""

import dataclasses
import sys

from reference import SHALLOW, SMALL

from sam_jax import cli

# Both kinds of encoder blocks, and one decoder block.
CONFIG = dataclasses.replace(SMALL, mask_decoder=SHALLOW.mask_decoder)


def run_command(*arguments):
    before, sys.argv = sys.argv, ["sam-jax", *map(str, arguments)]
    try:
        cli.main()
    finally:
        sys.argv = before
