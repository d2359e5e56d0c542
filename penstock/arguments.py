"""What commands check of their arguments."""

import argparse
from pathlib import Path


def count(text: str) -> int:
    """A whole number of at least 1; a `type` of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def place(text: str) -> Path | str:
    """Where a set lies: a folder as a Path, or an address of an object store; a `type` of argparse."""
    from penstock.errors import InputError
    from penstock.streams.sets.storage import open_storage

    try:
        return text if open_storage(text).fetches else Path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).replace("%", "%%")) from None
