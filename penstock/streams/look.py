"""`penstock shards where | doctor`: what a run is served, and how fast this machine can."""

import argparse
from pathlib import Path

from penstock.arguments import count
from penstock.errors import DONE

WHERE = """Names the samples of one optimizer step of a run: set, shard, key and label, and what keys the randomness of
the views. RUN_OR_RECIPE is a run's folder, or a recipe of any stage; steps count from 0, as in ledgers and lists of
unreadable samples."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    where = commands.add_parser("where", help="name the samples of a step of a run", description=WHERE)
    add = where.add_argument
    add("address", metavar="RUN_OR_RECIPE", type=Path)
    add("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    add("--step", metavar="N", type=_number, required=True, help="optimizer steps done before it")
    add("--rank", metavar="R", type=_number, help="this rank's samples only")
    add("--world", metavar="W", type=count, help="ranks (default: as many as the run had then, or 1)")
    add("--json", action="store_true", help="a line of JSON for each sample")
    where.set_defaults(run=_where)


def _where(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from penstock.streams.where import places, print_places

    found = list(places(args.address, args.overrides, args.step, args.rank, args.world))
    if args.json:
        for place in found:
            print(json.dumps(asdict(place), ensure_ascii=False))
    else:
        print_places(found)
    return DONE


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
