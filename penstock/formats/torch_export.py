"""`model.pt2`: the graph of `torch.export`, which torch alone loads and runs.

    program = torch.export.load("model.pt2", extra_files=(said := {"penstock.json": ""}))
    answers = program.module()(images)  # {"logits": ..., "probabilities": ...}; said: classes, preprocessing, ...

torch evaluates and unpickles parts of such a file. Here it is looked through first, so that a file can only compute.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.errors import InputError
from penstock.formats.about import KEY, REMEDY, About
from penstock.formats.network import Network

FILE = "model.pt2"
EXTRA = f"{KEY}.json"

# The parts that a network has; others hold pickled objects or compiled libraries.
_PARTS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|data/sample_inputs/model\.pt|extra/{re.escape(EXTRA)}"
)
_OPERATION = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|ge|gt|le|lt|getitem)"
)
_EXPRESSION = re.compile(
    r"(Symbol\('\w+'(, \w+=True)*\)|Integer\(-?\d+\)|(Add|Mul|Mod|FloorDiv|Max|Min|Eq|Ne|Ge|Gt|Le|Lt)\b"
    r"|[\d\s(),*+-])+"
)


class Traced(NamedTuple):
    """The graph of a network, for any number of images B >= 1 at a time."""

    program: torch.export.ExportedProgram
    about: About


def trace(network: Network) -> Traced:
    # Two images, for a graph traced with one would take the batch for a constant.
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(network, (network.example(2),), dynamic_shapes={"images": {0: batch}})
    return Traced(program, network.about)


def write(traced: Traced) -> bytes:
    """The file's content."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about its own
        torch.export.save(traced.program, file, extra_files={EXTRA: traced.about.text()})
    return file.getvalue()


def read(content: bytes, where: Path) -> tuple[Callable[[Tensor], Tensor], About]:
    """A function from uint8 images to logits, or features, and what the file says of itself.

    Raises:
        InputError: damaged, not written by `write`, or holding more than a network.
    """
    about = About.read(_looked_through(content, where), where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(io.BytesIO(content)).module()
    except Exception as error:  # torch raises nearly anything on a graph of another version
        raise InputError(f"{where} cannot be loaded by torch {torch.__version__}: {_line(error)}; {REMEDY}") from error

    @torch.no_grad()
    def answers(images: Tensor) -> Tensor:
        return next(iter(module(images).values()))

    return answers, about


def _looked_through(content: bytes, where: Path) -> str | None:
    """What the file says of itself, after a check that loading it runs nothing but tensor operations."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            broken = archive.testzip()
            if broken is not None:
                raise InputError(f"{where} is damaged: the checksum of {broken} is wrong; {REMEDY}")
            parts = {name: archive.read(entry) for name, entry in zip(names, archive.infolist(), strict=True)
                     if name.endswith((".json", "sample_inputs/model.pt"))}  # fmt: skip
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise InputError(f"{where} is damaged, or no file of torch.export: {error}; {REMEDY}") from error
    if EXTRA not in [name.removeprefix("extra/") for name in names]:
        return None
    strange = next((name for name in names if not _PARTS.fullmatch(name)), None)
    if strange is not None or len(set(names)) != len(names):
        raise InputError(f"{where} holds {strange or 'a part twice'}, which no network of ours has; it is not loaded")
    try:
        inputs = parts.pop("data/sample_inputs/model.pt", b"")
        if inputs:
            torch.load(io.BytesIO(inputs), weights_only=True)
        documents = {name: json.loads(part) for name, part in parts.items()}
    except Exception as error:  # what torch raises for a pickle that is not tensors alone differs
        raise InputError(f"{where} is damaged or not safe to load: {_line(error)}; {REMEDY}") from error
    for name, document in documents.items():
        if not name.startswith("extra/"):
            for reason in _unsafe(document):
                raise InputError(f"{where} is not loaded, for {name} holds more than a network: {reason}")
    return parts[f"extra/{EXTRA}"].decode()


def _unsafe(value: Any, key: str = "") -> Iterator[str]:
    """What torch would run of a document: pickles, expressions that it evaluates, and functions by name."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unsafe(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe(inner, key)
    elif (
        (key == "use_pickle" and value)
        or (key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)))
        or (key == "target" and not _OPERATION.fullmatch(str(value)))
        or (key == "expr_str" and not _EXPRESSION.fullmatch(str(value)))
    ):
        yield f"{key} {str(value)[:80]!r}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
