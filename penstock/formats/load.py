"""A network from a file or folder of any form, as one function."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.errors import InputError
from penstock.formats.about import About

if TYPE_CHECKING:
    from penstock.formats.network import Network


@dataclass(frozen=True)
class Model:
    """A trained network, wherever it came from."""

    path: Path
    about: About
    # uint8 images [B, C, H, W] to logits [B, K], or features [B, D], fp32, on the CPU
    answers: Callable[[Tensor], Tensor]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated, fp64 [B, K]."""
        return (logits.double() / self.about.temperature).softmax(-1)


def open_model(path: Path, device: torch.device | None = None) -> Model:
    """Open a run, an export folder, a `.pt2` or a `.onnx` file, or timm's pretrained `timm:MODEL`.

    Args:
        device: for a folder or timm's; files run on the CPU.

    Raises:
        InputError: there is none of these, or it is damaged.
    """
    if str(path).startswith("timm:"):
        from penstock.adopt import adopt

        with tempfile.TemporaryDirectory() as folder:
            return replace(open_model(adopt(str(path), Path(folder, "export")), device), path=path)
    if path.suffix in (".pt2", ".onnx"):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        if path.suffix == ".pt2":
            from penstock.formats import torch_export as form
        else:
            from penstock.formats import onnx as form  # type: ignore[no-redef]
        outputs, about = form.read(content, path)
        return Model(path, about, lambda images: next(iter(outputs(images).values())))
    from penstock.export import export_folder
    from penstock.formats.network import load_network

    network = load_network(export_folder(path)).to(device or torch.device("cpu"))
    return Model(path, network.about, lambda images: _on(network, images))


@torch.no_grad()
def _on(network: "Network", images: Tensor) -> Tensor:
    device = next(network.parameters()).device
    return network.answers(images.to(device)).cpu()
