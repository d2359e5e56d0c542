"""A `.pt2` file reduced to what can only compute: torch runs, evaluates and unpickles parts of such a file as it loads.

Every part, key, name and operation must be one known to be harmless. What has passed is written anew, so that torch
reads the very bytes that were looked at, whatever else the file holds.
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from penstock.errors import InputError
from penstock.formats.about import KEY, REMEDY
from penstock.formats.operations import ATEN

EXTRA = f"{KEY}.json"
_MODEL, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"

# The parts that a network has; others hold pickled objects or compiled libraries.
_PARTS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|data/sample_inputs/model\.pt|extra/{re.escape(EXTRA)}"
)
_ARGUMENTS = re.compile(
    r"as_(none|(optional_)?tensors?|ints?|int_lists|floats?|float_lists|bools?|string|sym_(int|float|bool)s?"
    r"|scalar_type|memory_format|layout|device|complex|name|expr)"
)
_EMPTY = ("guards_code", "use_pickle", "custom_obj_values", "treespec_namedtuple_fields")

# torch makes Python source of names. By the key that a string stands under; all others are dotted names, or nothing.
_NAME = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
_DOTTED = re.compile(r"([A-Za-z_]\w*(\.\w+)*)?", re.ASCII)
_TEXTS = {
    "name": _NAME,
    "as_name": _NAME,
    "forward_arg_names": _NAME,
    "target": re.compile(
        rf"torch\.ops\.aten\.({'|'.join(sorted(ATEN))})\.\w+"
        r"|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|ge|gt|le|lt|getitem)",
        re.ASCII,
    ),
    "expr_str": re.compile(
        r"(Symbol\('\w+'(, \w+=True)*\)|\b(Integer|Add|Mul|Mod|FloorDiv|Max|Min|Eq|Ne|Ge|Gt|Le|Lt)\b|[\d\s(),-])+",
        re.ASCII,
    ),
    "path_name": re.compile(r"(weight|tensor)_\d+", re.ASCII),
    "as_string": re.compile(r"[\w ,.>-]*", re.ASCII),
    "as_float": re.compile(r"-?\w+", re.ASCII),  # Infinity
    "torch_version": re.compile(r"[\w.+-]*", re.ASCII),
}
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict")


def checked(content: bytes, where: Path) -> tuple[bytes, str | None]:
    """A file of the same network that can only compute, and what it says of itself.

    Raises:
        InputError: damaged, or holding more than a network.
    """
    parts = _parts(content, where)
    about = parts.get(f"extra/{EXTRA}")
    if about is None:
        return b"", None
    try:
        if _INPUTS in parts:
            inputs = torch.load(io.BytesIO(parts[_INPUTS]), weights_only=True)
            torch.save(inputs, anew := io.BytesIO())
            parts[_INPUTS] = anew.getvalue()
        documents = {name: json.loads(part) for name, part in parts.items() if name.endswith(".json")}
        said = about.decode()
    except Exception as error:  # what torch raises for a pickle that is not tensors alone differs
        raise InputError(f"{where} is damaged or not safe to load: {line(error)}; {REMEDY}") from error
    for name, document in documents.items():
        if name.startswith("extra/"):
            continue
        try:
            if name == _MODEL:
                _drop_notes(document)
            reason = next(_unsafe(document), None)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{where} is damaged or not safe to load: {line(error)}; {REMEDY}") from error
        if reason is not None:
            raise InputError(f"{where} is not loaded, for {name} holds more than a network: {reason}")
        parts[name] = json.dumps(document).encode()
    fresh = io.BytesIO()
    with zipfile.ZipFile(fresh, "w") as archive:
        for name, part in parts.items():
            archive.writestr(f"archive/{name}", part)
    return fresh.getvalue(), said


def line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _parts(content: bytes, where: Path) -> dict[str, bytes]:
    """All parts by name, without the folder that they are in."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = [(entry.filename.partition("/")[2], archive.read(entry)) for entry in archive.infolist()]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: encrypted
        raise InputError(f"{where} is damaged, or no file of torch.export: {error}; {REMEDY}") from error
    parts = dict(found)
    if f"extra/{EXTRA}" not in parts:
        return {}
    strange = next((name for name in parts if not _PARTS.fullmatch(name)), None)
    if strange is not None or len(parts) != len(found):
        raise InputError(f"{where} holds {strange or 'a part twice'}, which no network of ours has; it is not loaded")
    return parts


def _drop_notes(program: Any) -> None:
    """Where each operation came from: for people, and nothing is computed with it."""
    for node in program["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}


def _unsafe(value: Any, key: str = "") -> Iterator[str]:
    """What is not known to be harmless, of a document of torch's."""
    if key in _EMPTY and value:
        yield f"{key} {str(value)[:80]!r}"
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not _DOTTED.fullmatch(name) or (name.startswith("as_") and not _ARGUMENTS.fullmatch(name)):
                yield f"the key {name[:80]!r}"
            yield from _unsafe(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe(inner, key)
    elif isinstance(value, str):
        harmless = _structure(value) if key in ("in_spec", "out_spec") else _TEXTS.get(key, _DOTTED).fullmatch(value)
        if not harmless:
            yield f"{key} {value[:80]!r}"


def _structure(text: str) -> bool:
    """Whether it describes tuples, lists and dicts with names for keys, and nothing else."""

    def plain(spec: Any) -> bool:
        if set(spec) != {"type", "context", "children_spec"}:
            return False
        context = None if spec["context"] is None else json.loads(spec["context"])
        if spec["type"] == "builtins.dict":
            known = isinstance(context, list) and all(isinstance(k, str) and _NAME.fullmatch(k) for k in context)
        else:
            known = context is None and (spec["type"] is None or spec["type"] in _CONTAINERS)
        return known and all(plain(child) for child in spec["children_spec"])

    protocol, spec = json.loads(text)
    return protocol == 1 and plain(spec)
