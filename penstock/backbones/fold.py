"""Batch normalisation folded into the convolution or linear layer before it: the same outputs with fewer operations."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree

from penstock.backbones.weights import CONFIG_FILE
from penstock.errors import InputError
from penstock.streams.sets.atomic import sync_folder

FOLDED_FILE = "model-folded.safetensors"
Structure = list[tuple[str, str]]  # names of (convolution or linear layer, batch norm folded into it)
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_TOLERANCE = 1e-4  # of the largest output; fp32 rounding over a hundred layers stays below a tenth of it


def fold_batchnorm(model: nn.Module, example: Tensor) -> Structure:
    """Fold every batch norm of `model`, in place, whose input is the output of one convolution or linear layer.

    What feeds what is seen in a forward pass of `example`, by the tensors' identity. A batch norm is folded only if it
    alone reads that output, each of the two layers runs once, and the weight is used as it is and by no other layer
    (weight-standardised convolutions do not); all others stay. The model is left in eval mode.

    Args:
        example: an input of `model`, such as normalised images fp32 [B, C, H, W].

    Returns:
        What was folded, in the order of the forward pass; JSON-ready, for `fold_structure`.

    Raises:
        RuntimeError: outputs changed, so the model does something this does not know; do not use it.
    """
    model.eval()
    structure, before = _trace(model, example)
    with torch.no_grad():
        for convolution, norm in structure:
            _fold_weights(model.get_submodule(convolution), model.get_submodule(norm))
        fold_structure(model, structure)
        after = _tensors(model(example))
    for old, new in zip(_tensors(before), after, strict=True):
        apart = float((old - new).abs().max() / old.abs().max().clamp(min=1e-12))
        if not apart < _TOLERANCE:
            raise RuntimeError(f"folding changed the outputs of {type(model).__name__} by {apart:.1e} of their largest")
    return structure


def fold_structure(model: nn.Module, structure: Sequence[Sequence[str]]) -> None:
    """Give `model` the modules that folding leaves, so that folded weights can be loaded; values are not computed."""
    for convolution, norm in structure:
        layer, folded = model.get_submodule(convolution), model.get_submodule(norm)
        if layer.bias is None:
            size = folded.running_mean
            assert isinstance(size, Tensor) and isinstance(layer.weight, Tensor)
            layer.register_parameter("bias", nn.Parameter(torch.zeros_like(size, dtype=layer.weight.dtype)))
        parent, _, name = norm.rpartition(".")
        setattr(model.get_submodule(parent), name, _what_follows(folded))


def save_folded(model: nn.Module, folder: Path, example: Tensor) -> Structure:
    """Add the folded weights of `model` (a timm model) to its export in `folder`, and their structure to config.json.

    The model itself is not changed.
    """
    from safetensors.torch import save_file

    twin = copy.deepcopy(model).float().cpu()
    structure = fold_batchnorm(twin, example.float().cpu())
    weights = {name: value.contiguous().clone() for name, value in twin.state_dict().items()}
    partial = folder / f".{FOLDED_FILE}.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    about = _read(folder)
    about["folded"] = {"file": FOLDED_FILE, "sha256": _digest(partial), "structure": structure}
    described = folder / f".{CONFIG_FILE}.partial"
    described.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / FOLDED_FILE)  # before the config that names it
    described.replace(folder / CONFIG_FILE)
    sync_folder(folder)
    return structure


def load_folded(folder: str | Path) -> nn.Module:
    """The folded timm model of an export, in eval mode.

    Raises:
        InputError: the folder is no export, holds no folded weights, or they are damaged.
    """
    import timm
    from safetensors.torch import load_file

    folder = Path(folder)
    about = _read(folder)
    if "folded" not in about:
        raise InputError(f"{folder} holds no folded weights; export again with folding")
    file = folder / about["folded"]["file"]
    if not file.is_file() or _digest(file) != about["folded"]["sha256"]:
        raise InputError(f"{file} is damaged: its checksum is not the one in {CONFIG_FILE}; export again")
    arguments = {**about.get("model_args", {}), "num_classes": about["num_classes"]}
    model = timm.create_model(about["architecture"], pretrained=False, **arguments)
    fold_structure(model, about["folded"]["structure"])
    model.load_state_dict(load_file(file))
    return model.eval()


class _Trace(TorchFunctionMode):
    """Watches one forward pass: which layer made a tensor, which batch norm read it, and who else did."""

    def __init__(self, model: nn.Module):
        super().__init__()
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for key in ("weight", "running_mean"):
                value = getattr(module, key, None)
                if isinstance(value, Tensor):
                    owners.setdefault(id(value), []).append(name)
        self.owners = owners
        self.made: dict[int, tuple[str, Tensor]] = {}  # by id of an output; holding the tensor keeps its id its own
        self.read: dict[int, list[str | None]] = {}  # the batch norms that read it; None is any other reader
        self.runs: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if any(isinstance(leaf, Tensor) for leaf in tree.tree_leaves(result)):  # asking for a shape reads nothing
            reader = self._owner(args, kwargs, 1, "running_mean") if name == "batch_norm" else None
            for leaf in tree.tree_leaves((args, kwargs)):
                if id(leaf) in self.made and leaf is self.made[id(leaf)][1]:
                    self.read.setdefault(id(leaf), []).append(reader)
            if reader is not None:
                self._run(reader)
        if name in (*_CONVOLUTIONS, "linear"):
            maker = self._owner(args, kwargs, 1, "weight")
            if maker is not None:
                self._run(maker)
                dimensions = 2 if name == "linear" else int(name[-2]) + 2
                if result.ndim == dimensions:  # so that batch norm's channels are this layer's outputs
                    self.made[id(result)] = (maker, result)
        return result

    def _owner(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, key: str) -> str | None:
        value = kwargs.get(key, args[place] if len(args) > place else None)
        names = self.owners.get(id(value), [])
        return names[0] if len(names) == 1 else None

    def _run(self, name: str) -> None:
        self.runs[name] = self.runs.get(name, 0) + 1


@torch.no_grad()
def _trace(model: nn.Module, example: Tensor) -> tuple[Structure, Any]:
    """The pairs to fold, and the model's output."""
    with _Trace(model) as trace:
        output = model(example)
    returned = {id(leaf) for leaf in _tensors(output)}
    pairs = []
    for key, (maker, _) in trace.made.items():
        readers = trace.read.get(key, [])
        norm = readers[0] if len(readers) == 1 and key not in returned else None
        if norm is not None and trace.runs[maker] == 1 and trace.runs[norm] == 1 and _foldable(model, maker, norm):
            pairs.append((maker, norm))
    return pairs, output


def _foldable(model: nn.Module, maker: str, norm: str) -> bool:
    layer, batchnorm = model.get_submodule(maker), model.get_submodule(norm)
    known = isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))
    return known and isinstance(batchnorm, nn.modules.batchnorm._BatchNorm)


def _fold_weights(layer: Any, norm: Any) -> None:
    """Scale the layer's weight and shift its bias, in fp64."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = layer.groups if transposed else 1  # a transposed weight is [in, out / groups, ...]

    def per_group(values: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * groups if values is None else values.detach().double().chunk(groups)

    given = (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    parts = [
        nn.utils.fusion.fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift, transpose=transposed)
        for weight, bias, mean, var, scale, shift in zip(*map(per_group, given), strict=True)
    ]
    layer.weight.copy_(torch.cat([weight for weight, _ in parts]))
    bias = torch.cat([bias for _, bias in parts]).to(layer.weight.dtype)
    layer.bias = nn.Parameter(bias, layer.weight.requires_grad)


def _what_follows(norm: nn.Module) -> nn.Module:
    """What a batch norm does after normalising: timm's BatchNormAct2d and ours hold a dropout and an activation."""
    rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not an export: {CONFIG_FILE} cannot be read: {error}") from error


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
