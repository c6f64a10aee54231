"""The command `sam-jax`."""

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

import docstring_parser
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


def join_help(command: type) -> None:
    """Makes each option's docstring one line, since tyro would break lines where it does."""
    for part in filter(dataclasses.is_dataclass, command.__mro__):
        options = {option.name: option for option in dataclasses.fields(part)}
        for documented in docstring_parser.parse_from_object(part).params:
            text = " ".join((documented.description or "").split())
            options[documented.arg_name].metadata = {"help": text}  # pyright: ignore[reportAttributeAccessIssue]


def expand_home(args: Any) -> Any:
    """The command with `~` in its paths replaced, as a shell does for paths without quotes."""

    def expand(value):
        if isinstance(value, tuple):
            return tuple(map(expand, value))
        return value.expanduser() if isinstance(value, Path) else value

    return dataclasses.replace(args, **{name: expand(value) for name, value in vars(args).items()})


def main() -> None:
    """Runs the command; user errors are printed to stderr in one line, with exit code 1."""
    for command in COMMANDS.values():
        join_help(command)
    args = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="sam-jax", description="Segment Anything in JAX."
    )
    args = expand_home(args)
    # So that `finally` and `with` tidy up: locks, hidden files and threads.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _FUNCTIONS[type(args)](args)
    except OSError as error:
        is_of_file = error.filename is not None and error.strerror is not None
        what = f"{error.filename}: {error.strerror}" if is_of_file else error
        sys.exit(f"sam-jax: {what}")
    except (ValueError, TypeError, SafetensorError, MissingExtra) as error:
        sys.exit(f"sam-jax: {error}")
    except KeyboardInterrupt:
        print("sam-jax: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
