"""`model.int8.onnx`: weights and activations in 8 bits, the ranges of activations measured on real images.

Static quantization as QDQ nodes, which onnxruntime fuses into integer kernels; weights have a scale per channel. What
reads pixels, what gives the answers, and attention's products of two activations stay in fp32, and ranges leave out the
outermost values: on CIFAR-10 fewer labels change so, and it takes no longer. Dynamic quantization would make an answer
depend on the other images of its batch.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from penstock.formats import onnx as fp32
from penstock.formats.about import About

FILE = "model.int8.onnx"
IMAGES, BATCH = 256, 8  # that ranges are measured on; the activations of a batch are in memory at a time
OPERATIONS = ["Conv", "MatMul", "Gemm"]  # where the arithmetic is


def write(plain: bytes, about: About, images: Sequence[Tensor]) -> bytes:
    """The file's content.

    Args:
        plain: the content of `model.onnx`.
        images: batches uint8 [B, C, H, W], prepared.
    """
    fp32.need("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, fp32.quiet():
        given, prepared, made = (Path(folder, name) for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
        given.write_bytes(plain)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            made,
            _reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATIONS,
            nodes_to_exclude=_sensitive(onnx.load(prepared).graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,  # 99.999, onnxruntime's own
            # No reduce_range, which x86 without VNNI needs: the logits of small networks err 28 to 77 % more with it.
            extra_options={"CalibStridedMinMax": 1},  # batches whose activations are kept together
        )
        return fp32.content_of(onnx.load(made), about, onnx)


def _sensitive(graph: Any) -> list[str]:
    """Names of the operations left in fp32."""
    weights = {tensor.name for tensor in graph.initializer}
    weighted = [node for node in graph.node if node.op_type in OPERATIONS and weights.intersection(node.input)]
    products = [node for node in graph.node if node.op_type == "MatMul" and not weights.intersection(node.input)]
    last = _last(graph, weighted) if graph.output[0].name == "logits" else weighted[-1:]
    return [node.name for node in (*weighted[:1], *last, *products)]


def _last(graph: Any, weighted: Sequence[Any]) -> list[Any]:
    """The operations with weights that logits come from: one, or both classifiers of a distilled head."""
    made_by = {name: node for node in graph.node for name in node.output}
    names, found = [graph.output[0].name], []
    while names:
        node = made_by.get(names.pop())
        if node is None:
            continue
        if node in weighted:
            found.append(node)
        else:
            names.extend(node.input)
    return found


def _reader(images: Sequence[Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __len__(self) -> int:
            return len(images)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = iter(images[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()
