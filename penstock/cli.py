"""The `penstock` command."""

import argparse
import os
import sys
from collections.abc import Sequence

from penstock import __version__
from penstock.augment import _commands as augment
from penstock.errors import INPUT_WRONG, STOPPED, InputError
from penstock.evaluate import _commands as evaluate
from penstock.evaluate import _students as students
from penstock.formats import _commands as formats
from penstock.streams.sets import commands as shards
from penstock.tracking import commands as tracking

PIPE_CLOSED = 1  # as rich ends a program then


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Errors of input are told without a traceback."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # so that a reader that has gone is noticed here, not when Python ends
    except BrokenPipeError:
        # `penstock compare ... | head` has read enough. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="penstock", description="Streams of images in, small accurate models out.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shards.add_commands(commands)
    augment.add_commands(commands)
    evaluate.add_commands(commands)
    students.add_commands(commands)
    formats.add_commands(commands)
    tracking.add_commands(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return INPUT_WRONG
    except KeyboardInterrupt:
        print("penstock: stopped; finished shards are kept, and the same command goes on from them", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
