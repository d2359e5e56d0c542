"""The parts of a recipe that an ablation switches: known ones by name, others as `name:key=value-without-it`."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from penstock.errors import InputError, nearest

TABLE = Path(__file__).with_name("parts.yaml")
AT_END = "at-end"


@dataclass(frozen=True)
class Part:
    """A part and the recipe without it."""

    name: str
    off: Mapping[str, str]  # recipe key: value as it stands on a command line
    on: str = ""  # what to write to have it


def known_parts() -> dict[str, dict[str, Any]]:
    """The table: per name `what`, `without` and `example`."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def choose(words: Sequence[str], recipe: Mapping[str, Any]) -> list[Part]:
    """The parts that `--over` names.

    Args:
        words: as given, each a list with commas: `mixup,erase`, `rate:optim.lr=1e-4`. A further `key=value` belongs to
            the part before it.
        recipe: the merged recipe, nested, to look up the curves whose last value a part is without.
    """
    chosen: list[Part] = []
    for item in (item.strip() for word in words for item in _split(word)):
        name, colon, setting = item.partition(":")
        if re.fullmatch(r"[\w-]+", name) and colon:
            chosen.append(Part(name, _setting(setting, item)))
        elif "=" in item and chosen and not chosen[-1].on:
            last = chosen.pop()
            chosen.append(Part(last.name, {**last.off, **_setting(item, item)}))
        else:
            chosen.append(_known(item, recipe))
    names = [part.name for part in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--over names {', '.join(twice)} twice")
    if not chosen:
        raise InputError(f"--over names no part; known are {', '.join(known_parts())}, and any as name:key=value")
    return chosen


def _split(word: str) -> list[str]:
    """At commas outside brackets."""
    return [item for item in re.split(r",(?![^\[{(]*[\]})])", word) if item.strip()]


def _setting(text: str, item: str) -> dict[str, str]:
    key, equals, value = text.partition("=")
    if not (equals and re.fullmatch(r"\w+(\.\w+)*", key.strip())):
        raise InputError(f"--over {item!r}: write name:key=value, with the value that the recipe has without the part")
    return {key.strip(): value.strip()}


def _known(name: str, recipe: Mapping[str, Any]) -> Part:
    table = known_parts()
    if name not in table:
        raise InputError(
            f"--over: no part is called {name!r}{nearest(name, table)} (known: {', '.join(table)}); "
            "any other is given as name:key=value, with the value that the recipe has without it"
        )
    entry = table[name]
    return Part(name, {key: _text(key, value, recipe) for key, value in entry["without"].items()}, entry["example"])


def _text(key: str, value: Any, recipe: Mapping[str, Any]) -> str:
    if value != AT_END:
        return json.dumps(value)
    from pydantic import TypeAdapter

    from penstock.schedule import Clock, Curve, value_at

    there: Any = recipe
    for word in key.split("."):
        there = there.get(word) if isinstance(there, Mapping) else None
    last = value_at(TypeAdapter(Curve).validate_python(there), math.inf, Clock(1, 1, 1)) if _is_curve(there) else there
    return json.dumps(int(last) if isinstance(last, float) and last.is_integer() else last)


def _is_curve(value: Any) -> bool:
    return isinstance(value, Mapping)
