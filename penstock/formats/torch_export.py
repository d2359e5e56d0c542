"""`model.pt2`: the graph of `torch.export`, which torch alone loads and runs.

    program = torch.export.load("model.pt2", extra_files=(said := {"penstock.json": ""}))
    answers = program.module()(images)  # {"logits": ..., "probabilities": ...}; said: classes, preprocessing, ...

torch evaluates and unpickles parts of such a file; `checked` makes one of it that can only compute.
"""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.errors import InputError
from penstock.formats.about import REMEDY, About
from penstock.formats.checked import EXTRA, checked, line
from penstock.formats.compare import Outputs
from penstock.formats.network import Network

FILE = "model.pt2"


class Traced(NamedTuple):
    """The graph of a network, for any number of images B >= 1 at a time."""

    program: torch.export.ExportedProgram
    about: About


def trace(network: Network) -> Traced:
    # Two images, for a graph traced with one would take the batch for a constant.
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(network, (network.example(2),), dynamic_shapes={"images": {0: batch}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # files and lines of whoever exports
    return Traced(program, network.about)


def write(traced: Traced) -> bytes:
    """The file's content."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about its own
        torch.export.save(traced.program, file, extra_files={EXTRA: traced.about.text()})
    return file.getvalue()


def read(content: bytes, where: Path) -> tuple[Outputs, About]:
    """A function from uint8 images to all outputs by name, and what the file says of itself.

    Raises:
        InputError: damaged, not written by `write`, or holding more than a network.
    """
    harmless, said = checked(content, where)
    about = About.read(said, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(io.BytesIO(harmless)).module()
    except Exception as error:  # torch raises nearly anything on a graph of another version
        raise InputError(f"{where} cannot be loaded by torch {torch.__version__}: {line(error)}; {REMEDY}") from error

    @torch.no_grad()
    def outputs(images: Tensor) -> dict[str, Tensor]:
        return module(images)

    return outputs, about
