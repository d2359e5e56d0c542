"""`model.onnx`: for onnxruntime, and all that reads ONNX; its metadata says, under `penstock`, what it is."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.errors import InputError
from penstock.formats.about import KEY, REMEDY, About
from penstock.formats.compare import Outputs
from penstock.formats.torch_export import Traced

FILE = "model.onnx"
OPSET = 20  # the first with Gelu, which torch's exporter writes
LARGEST = 2**31  # bytes of a protobuf message


def need(*libraries: str) -> None:
    """InputError unless they are installed."""
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError(f"ONNX needs {', '.join(absent)}; install with pip install 'penstock[export]'")


def write(traced: Traced) -> bytes:
    """The file's content, checked by ONNX."""
    need("onnx", "onnxscript")
    import onnx

    with quiet():
        made = torch.onnx.export(
            traced.program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["features"] if traced.about.classes is None else ["logits", "probabilities"],
            verbose=False,
        )
    assert made is not None
    model = made.model_proto
    _name_batch(model.graph)
    return content_of(model, traced.about, onnx)


def _name_batch(graph: Any) -> None:
    """Call the one size that is open `batch`, in the place of torch's symbol."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = size.dim_param.replace(symbol, "batch")


def content_of(model: Any, about: About, onnx: Any) -> bytes:
    """A model with what it says of itself, and nothing of whoever exports, checked and serialised."""
    for noted in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        noted.ClearField("metadata_props")
    for noted in (*model.graph.initializer, *model.functions, *(n for f in model.functions for n in f.node)):
        noted.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {KEY: about.text()})
    if model.ByteSize() >= LARGEST:
        raise InputError(
            f"a network of {model.ByteSize() / 1e9:.1f} GB does not fit into one ONNX file; use --to torch"
        )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def read(content: bytes, where: Path) -> tuple[Outputs, About]:
    """A function from uint8 images to all outputs by name, by onnxruntime on the CPU, and what the file says of itself.

    Raises:
        InputError: damaged, or not written by Penstock.
    """
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception for each of its codes, without a common class
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(f"{where} is damaged, or no ONNX file: {first}; {REMEDY}") from error
    about = About.read(session.get_modelmeta().custom_metadata_map.get(KEY), where)
    names = [output.name for output in session.get_outputs()]

    def outputs(images: Tensor) -> dict[str, Tensor]:
        found = session.run(names, {"images": images.contiguous().numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return outputs, about


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's and onnxscript's progress and warnings, which are about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
