"""The command `sam-jax`."""

import sys

import tyro
from safetensors import SafetensorError

from sam_jax.commands.demo import Demo, demo
from sam_jax.commands.evaluate import Evaluate, evaluate
from sam_jax.commands.export import Export, export
from sam_jax.commands.generate import Generate, generate
from sam_jax.commands.segment import Segment, segment
from sam_jax.errors import MissingExtra

_FUNCTIONS = {
    Segment: segment,
    Generate: generate,
    Evaluate: evaluate,
    Export: export,
    Demo: demo,
}

COMMANDS = {function.__name__: command for command, function in _FUNCTIONS.items()}


def main() -> None:
    """Runs the command; user errors are printed to stderr in one line, with exit code 1."""
    args = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="sam-jax", description="Segment Anything in JAX."
    )
    try:
        _FUNCTIONS[type(args)](args)
    except (OSError, ValueError, TypeError, SafetensorError, MissingExtra) as error:
        sys.exit(f"sam-jax: {error}")
    except KeyboardInterrupt:
        print("sam-jax: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
