"""A validation error of pydantic's in the words of a recipe: its key, and what to write instead."""

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic_core import ErrorDetails

from penstock.errors import nearest


def mistake(detail: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """The key that a validation error is about, and what to say about it."""
    key, block = _place(model, detail["loc"])
    message, last = detail["msg"].removeprefix("Value error, "), key.rpartition(".")[2]
    if detail["type"] == "extra_forbidden":
        known = [name for name, _ in _fields(block)]
        elsewhere = [k for k, _, _ in fields_of(model) if k.rpartition(".")[2] == last]
        return key, f"unknown key{f'; did you mean {elsewhere[0]}?' if elsewhere else nearest(last, known)}"
    if detail["type"] == "missing":
        return key, "too few values" if isinstance(detail["loc"][-1], int) else "missing; the recipe must give it"
    if detail["type"] == "union_tag_invalid":
        known = [name.strip("' ") for name in detail["ctx"]["expected_tags"].split(",")]
        return f"{key}.name", f"there is no {detail['ctx']['tag']!r}{nearest(detail['ctx']['tag'], known)}"
    if detail["type"] == "union_tag_not_found":
        return f"{key}.name", "missing; the block must be named"
    given = detail["input"]
    if detail["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return key, f"must be a block of keys and values, such as {{name: ...}}, not {given!r}"
    if isinstance(given, dict):  # a block's own rule; it may begin with the name of the field to blame
        field, _, text = message.partition(": ")
        if field.startswith(f"{last}."):  # further within
            return key.removesuffix(last) + field, text
        return (f"{key}.{field}", text) if field in dict(_fields(block)) else (key, message)
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool)) else ""
    return key, message if "not" in message and str(given) in message else f"{message}{shown}"


def _place(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, Any]:
    """pydantic's location as the recipe writes it, without places in lists and tags of unions; and the inmost block."""
    kept: list[str] = []
    kind: Any = model
    holder: Any = model
    for part in location:
        if part in (tagged := _tagged(kind)):
            kind = tagged[str(part)]
            continue
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            kept.append(str(part))
            continue
        blocks = _blocks(kind)
        if len(blocks) == 1:  # a block, or a block or null
            holder, kind = blocks[0], dict(_fields(blocks[0])).get(str(part))
            kept.append(str(part))
        else:
            named = {block.model_fields["name"].default: block for block in blocks if "name" in block.model_fields}
            kind = named.get(part, kind)
    return ".".join(kept), kind if isinstance(kind, type) and issubclass(kind, BaseModel) else holder


def _tagged(kind: Any) -> dict[str, Any]:
    """The members of a union that pydantic tells apart by a function of the value, by their tags."""
    members = [part for part in get_args(kind) if get_origin(part) is Annotated]
    return {mark.tag: get_args(part)[0] for part in members for mark in part.__metadata__ if isinstance(mark, Tag)}


def _by_name(kind: Any) -> bool:
    """Whether blocks come in a dictionary, under names that the recipe gives."""
    return get_origin(kind) is dict or any(map(_by_name, get_args(kind)))


def _fields(block: Any) -> list[tuple[str, Any]]:
    """The names of a block's fields, as recipes write them, and their types."""
    found = block.model_fields.items() if block is not None else ()
    return [(info.alias or name, info.annotation) for name, info in found]


def _blocks(kind: Any) -> list[type[BaseModel]]:
    """The blocks among the members of a union."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [block for part in get_args(kind) for block in _blocks(part)]


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, field, enclosing model) of every value that a recipe of this model may hold.

    Blocks that may be null, and components that are chosen by name, are values as well as what they hold.
    """
    for name, info in model.model_fields.items():
        key, blocks = prefix + name, _blocks(info.annotation)
        chosen = any(hasattr(mark, "package") for mark in info.metadata)
        if chosen or blocks != [info.annotation]:
            yield key, info, model
        if len(blocks) == 1:
            yield from fields_of(blocks[0], f"{key}.NAME." if _by_name(info.annotation) else f"{key}.")
