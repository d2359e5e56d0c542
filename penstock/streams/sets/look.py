"""`penstock shards where | doctor`: what a run is served, and how fast this machine can."""

import argparse
from pathlib import Path

from penstock.arguments import count
from penstock.errors import DONE

WHERE = """Names the samples of one optimizer step of a run: set, shard, key and label, and what keys the randomness of
the views. RUN_OR_RECIPE is a run's folder, or a recipe of any stage; steps count from 0, as in ledgers and lists of
unreadable samples."""

DOCTOR = """Serves samples of a set in training's own order and says what reading, decoding and augmenting them takes on
one core of this machine, what limits, and how many workers a rate needs. Whether the first reading was from memory, and
not from the disk, nothing here can tell for sure: try it on a machine that has not read the set lately."""


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
    doctor = commands.add_parser("doctor", help="measure how fast a set can be served here", description=DOCTOR)
    add = doctor.add_argument
    add("address", metavar="ADDRESS", help="a folder, or an address of an object store")
    add("--size", metavar="PIXELS", type=count, default=224, help="side of the views (224)")
    add("--images-per-second", metavar="X", type=_rate, help="what the network takes, over all ranks")
    add("--seconds", metavar="S", type=_rate, default=10.0, help="how long to measure (10)")
    doctor.set_defaults(run=_doctor)


def _where(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from penstock.streams.positions.where import places, print_places

    found = list(places(args.address, args.overrides, args.step, args.rank, args.world))
    if args.json:
        for place in found:
            print(json.dumps(asdict(place), ensure_ascii=False))
    else:
        print_places(found)
    return DONE


def _doctor(args: argparse.Namespace) -> int:
    from penstock.streams.doctor import examine, report

    print(report(examine(args.address, args.size, args.seconds), args.address, args.images_per_second))
    return DONE


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
