"""What commands check of their arguments."""

import argparse


def count(text: str) -> int:
    """A whole number of at least 1; a `type` of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)
