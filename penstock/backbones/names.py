"""Facts about timm's models from their names alone: no import of timm or torch, so a recipe is checked in a blink.

timm registers a model by decorating a function; its source files are read with a regular expression.
"""

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from penstock.errors import nearest

_REGISTERED = re.compile(
    r"^@register_model\s*\n(?:@.*\n)*def (?P<name>\w+)\(.*?\)\s*(?:->\s*(?P<class>[^:]+?))?:(?P<body>.*?)(?=^\S)",
    re.MULTILINE | re.DOTALL,
)
_PATCH_IN_NAME = re.compile(r"patch(\d+)|_p(\d+)_")
_PATCH_IN_BODY = re.compile(r"\bpatch_size=(\d+)")
# These classes resample their position embedding to the image they are given, when asked to.
_ANY_SIZE = {"VisionTransformer", "VisionTransformerDistilled", "Eva"}


@dataclass(frozen=True)
class ModelFacts:
    """What timm's source says about a registered model."""

    family: str  # the file it is defined in, such as "resnet"
    kind: str  # the class it returns, such as "VisionTransformer"; "" where the source does not say
    patch: int | None  # side of a patch in pixels, where its source or its name gives one


def _folder() -> Path:
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("timm is not installed; install the requirements (make demo does it)")
    return Path(spec.origin).parent / "models"


@cache
def timm_models() -> Mapping[str, ModelFacts]:
    """Every model that timm registers, by name."""
    found = {}
    for file in sorted(_folder().glob("*.py")):
        for match in _REGISTERED.finditer(file.read_text(encoding="utf-8") + "\n#"):
            in_body, in_name = _PATCH_IN_BODY.search(match["body"]), _PATCH_IN_NAME.search(match["name"])
            patch = (
                in_body[1] if in_body else next((text for text in in_name.groups() if text), None) if in_name else None
            )
            found[match["name"]] = ModelFacts(
                file.stem, (match["class"] or "").strip("'\" "), int(patch) if patch else None
            )
    return found


def timm_names() -> list[str]:
    """The names of timm's models, sorted; a tag of pretrained weights may follow a name after a dot."""
    return sorted(timm_models())


def facts(name: str) -> ModelFacts:
    """Facts of the model called `name`, with or without a tag.

    Raises:
        ValueError: no such model; the message proposes the nearest name.
    """
    bare = name.split(".", 1)[0]
    if bare not in timm_models():
        raise ValueError(f"no timm model is called {bare!r}{nearest(bare, timm_models())}")
    return timm_models()[bare]


def is_vit(name: str) -> bool:
    """Whether the model is timm's plain VisionTransformer, the class that masked pretraining works with."""
    return facts(name).kind == "VisionTransformer" and facts(name).family != "vision_transformer_hybrid"


def takes_any_size(name: str) -> bool:
    """Whether timm's `dynamic_img_size` exists for the model."""
    return facts(name).kind in _ANY_SIZE


def patch_of(name: str, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of a patch in pixels, where the options, timm's source or the name tell."""
    patch = options.get("patch_size", facts(name).patch)
    if patch is None:
        return None
    return (int(patch), int(patch)) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))


@cache
def arguments(name: str) -> frozenset[str] | None:
    """The arguments of the class behind a model, such as drop_path_rate; None where timm's source does not tell."""
    found = facts(name)
    return _class_arguments(found.family, found.kind) if found.kind else None


@cache
def _class_arguments(family: str, kind: str) -> frozenset[str] | None:
    file = _folder() / f"{family}.py"
    if not file.is_file():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for item in tree.body:
        if isinstance(item, ast.ImportFrom) and kind in {alias.name for alias in item.names}:
            return _class_arguments(str(item.module).removeprefix("timm.models."), kind)
    body = next((item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == kind), None)
    if body is None:
        return None
    init = next((item for item in body.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    own = frozenset(each.arg for each in (*init.args.args, *init.args.kwonlyargs)) if init else frozenset()
    if init is not None and init.args.kwarg is None:
        return own
    inherited = [_class_arguments(family, base.id) for base in body.bases if isinstance(base, ast.Name)]
    if not inherited or any(each is None for each in inherited):
        return None
    return own.union(*(each for each in inherited if each is not None))
