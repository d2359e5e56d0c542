"""All forms of one export: made, compared with the network before they are kept, then measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.backbones.weights import WEIGHTS_FILE
from penstock.errors import InputError
from penstock.formats import data, torch_export
from penstock.formats.compare import EXPORTED, Agreement, Answers, check, compare, latencies
from penstock.formats.load import Model, open_model
from penstock.formats.network import load_network
from penstock.streams.sets.atomic import replacing
from penstock.streams.sets.manifest import Manifest

CHECKED = 64  # images that a form is compared on before it is kept
TIMED = (1, 32)  # batch sizes


@dataclass(frozen=True)
class Written:
    """A form, and how it agrees with the network it was made from."""

    form: str
    file: Path
    agreement: Agreement
    milliseconds: dict[int, float]  # by batch size; empty where nothing was timed

    @property
    def megabytes(self) -> float:
        return self.file.stat().st_size / 1e6


def export_forms(
    export: Path,
    out: Path,
    forms: Sequence[str],
    calibration: Manifest | None = None,
    val: Manifest | None = None,
    fold: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Written]:
    """Write the forms of an export, and say how they agree with it.

    Args:
        forms: of "torch" and "onnx".
        calibration: a packed set for int8, which is left out without it.
        val: what is compared on, all of it; without it some images of `calibration`, or noise.
        tell: is given a line on what was folded.

    Raises:
        InputError: a set has other classes, a form computes something else, or a library is missing.
    """
    reference = load_network(export)
    network = reference
    if fold:
        network = load_network(export)
        norms = network.norms
        tell(f"{network.fold().about.folded} of {norms} batch norms folded")
    want: Answers = torch.no_grad()(reference.answers)
    if val is not None:
        data.check_labels(reference.about, val)
    source = val or calibration
    images = reference.example(CHECKED) if source is None else data.first(source, reference.about, CHECKED)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} is no folder and cannot become one: {error.strerror}") from None
    made: dict[str, Model] = {}
    traced = torch_export.trace(network)
    for form in forms:
        module = _module(form)
        file, content = out / module.FILE, module.write(traced)
        check(str(file), module.read(content, file)[0], torch.no_grad()(reference.forward), images)
        made[form] = _keep(file, content)
    if calibration is not None:
        from penstock.formats import int8, onnx

        plain = made["onnx"].path.read_bytes() if "onnx" in made else onnx.write(traced)
        ranges = data.batches(calibration, reference.about, int8.BATCH, limit=int8.IMAGES)
        made["int8"] = _keep(out / int8.FILE, int8.write(plain, network.about, [batch for batch, _ in ranges]))
    unknown = torch.full((len(images),), -1)
    shown = [(images, unknown)] if val is None else data.batches(val, reference.about)
    answers = {form: model.answers for form, model in made.items()}
    found = compare(answers, want, shown)
    times = {size: latencies(answers, images[:1].repeat(size, 1, 1, 1)) for size in TIMED} if "int8" in made else {}
    rows = [Written(EXPORTED, export / WEIGHTS_FILE, found[EXPORTED], {})]
    for form, model in made.items():
        rows.append(Written(form, model.path, found[form], {size: taken[form] for size, taken in times.items()}))
    return rows


def _module(form: str) -> Any:
    """The module that writes and reads a form."""
    if form == "torch":
        return torch_export
    from penstock.formats import onnx

    return onnx


def _keep(file: Path, content: bytes) -> Model:
    """Write a file, and open what was written."""
    try:
        with replacing(file) as handle:
            handle.write(content)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; give another folder with --out") from None
    return open_model(file)
