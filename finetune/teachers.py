"""A distillation's teacher: a classifier's export or any timm model, frozen."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from penstock import distributed
from penstock.adopt import TIMM, open_timm
from penstock.backbones import Backbone, names
from penstock.backbones.backbone import features_and_stages
from penstock.class_names import check_classes
from penstock.errors import InputError

log = logging.getLogger(__name__)


class Teacher(nn.Module):
    """Answers for images as a student gets them. In eval mode, without gradients, and no part of what trains.

    Attributes:
        name: as the recipe gives it.
        classes: names in the order of the logits; None where a timm model does not say.
        size: image (height, width) it was made for.
        smoothing: of the labels it learned from, where that is known; timm does not say.
        made: what the weights are the weights of, JSON values: equal weights of another network are another teacher.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        network: Any,
        classes: Sequence[str] | None,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        smoothing: float = 0.0,
        made: Any = None,
    ):
        super().__init__()
        self.name, self.network, self.size, self.smoothing, self.made = name, network, size, smoothing, made
        self.classes = None if classes is None else tuple(classes)
        self.register_buffer("mean", torch.tensor(list(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def channels(self) -> int:
        return len(self.mean)

    @torch.no_grad()
    def forward(self, images: Tensor, own: Backbone, stages: int = 0) -> Answer:
        """Its answer for images normalised as `own` takes them, float [B, C, H, W]; fp32 logits."""
        images = renormalize(images, (own.mean, own.std), (self.mean, self.std))
        logits, pooled, maps = self.network(images, stages)
        return Answer(logits.float(), pooled, maps)

    def widths(self, side: int) -> Widths:
        """The widths of its answers for images of `side` pixels. Raises InputError where it does not take them."""
        logits, pooled, _ = self._shapes(side, 0)
        maps = all_stages(self.network.model, lambda stages: self._shapes(side, stages)[2])
        return Widths(logits.shape[1], pooled.shape[1], maps)

    def outputs(self, side: int) -> int:
        """How many classes it tells apart. Raises InputError where it does not take images of `side` pixels."""
        return self._shapes(side, 0)[0].shape[1]

    def _shapes(self, side: int, stages: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What the network gives, on the meta device, where no arithmetic is done."""
        state = {name: value.to("meta") for name, value in self.network.state_dict(keep_vars=True).items()}
        state |= {name: value.to("meta") for name, value in self.network.named_buffers()}
        images = torch.empty(1, self.channels, side, side, device="meta")
        try:
            with torch.no_grad():
                return torch.func.functional_call(self.network, state, (images, stages))
        except (AssertionError, RuntimeError, ValueError) as error:
            made = " x ".join(map(str, self.size))
            raise InputError(
                f"task.teacher: {self.name}, made for {made} pixels, does not take the student's images "
                f"of {side} x {side}: {error}; set augment.size to a size of the teacher's, or take another teacher"
            ) from error

    def digest(self) -> str:
        """SHA-256 of its weights, of what they are the weights of, and of the mean and standard deviation it takes."""
        found = hashlib.sha256(json.dumps(self.made, sort_keys=True, default=str).encode())
        for name, value in sorted([*self.network.state_dict().items(), ("mean", self.mean), ("std", self.std)]):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class _Exported(nn.Module):
    """A classifier of Penstock's."""

    def __init__(self, classifier: Any):
        super().__init__()
        self.backbone, self.head = classifier.backbone, classifier.head

    @property
    def model(self) -> Any:
        return self.backbone.model

    def forward(self, images: Tensor, stages: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        features = self.backbone(images, stages)
        return self.head(features), features.pooled, features.stages


class _Timm(nn.Module):
    """A timm model with its own classifier."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, stages: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        hidden, maps = features_and_stages(self.model, images, stages)
        return self.model.forward_head(hidden), self.model.forward_head(hidden, pre_logits=True), maps


def load_teacher(name: str, classes: Sequence[str], channels: int, sizes: Sequence[int]) -> Teacher:
    """The teacher that a recipe names: a run, the folder of an export, or `timm:MODEL`.

    Args:
        classes: of the student, in label order.
        channels: of the student's images.
        sizes: sides of the images that it will be shown, in pixels.

    Raises:
        InputError: there is none, or it has other classes or in another order, or cannot see such images.
    """
    teacher = _timm(name) if name.startswith(TIMM) else _exported(name)
    if teacher.classes is not None:
        remedy = "finetune the teacher on this training set first, and give its export"
        check_classes(teacher.classes, classes, "data.train", "the teacher", remedy)
    if teacher.channels != channels:
        raise InputError(
            f"task.teacher: it takes images of {teacher.channels} channels, the student of {channels}; "
            "distill from a teacher of the same kind"
        )
    for side in sizes:
        outputs = teacher.outputs(side)
        if outputs != len(classes):
            raise InputError(
                f"task.teacher: {name} has {outputs} classes, the training set {len(classes)}; finetune the teacher on "
                "this set first, and give its export"
            )
    if teacher.classes is None:
        _warn("%s does not name its classes; they are taken to be those of data.train, in its order", name)
    if teacher.smoothing:
        _warn(
            "the teacher %s learned from labels smoothed by %g: smoothing makes answers for a class alike, and what "
            "they say of other classes is what a student learns from (Mueller, Kornblith and Hinton 2019); a teacher "
            "with loss.smoothing=0 teaches better",
            name, teacher.smoothing,
        )  # fmt: skip
    return teacher


def exists(name: str) -> bool:
    """Whether there is such a folder; models of timm's are looked up when they are loaded."""
    return name.startswith(TIMM) or Path(name).expanduser().is_dir()


def known(name: str) -> str:
    """The name; a validator.

    Raises:
        ValueError: timm has no such model; the message proposes the nearest name.
    """
    model = name.removeprefix(TIMM)
    if name.startswith(TIMM) and ":" not in model:  # local-dir:... and hf-hub:... are no names of timm's
        names.facts(model)
    return name


def all_stages(model: Any, maps: Callable[[int], tuple[Tensor, ...]]) -> tuple[int, ...]:
    """Channels of every stage that a timm model shows, the deepest last; none where it shows none."""
    stages = len(getattr(model, "feature_info", ()))
    try:
        return tuple(each.shape[1] for each in maps(stages)) if stages else ()
    except InputError:  # a model without `forward_intermediates`
        return ()


def renormalize(images: Tensor, own: tuple[Tensor, Tensor], its: tuple[Tensor, Tensor]) -> Tensor:
    """Images of one mean and std with those of another; the very images where these are the same."""
    if torch.equal(own[0], its[0]) and torch.equal(own[1], its[1]):
        return images
    shift = (own[0] - its[0]) / its[1]
    return torch.addcmul(shift[:, None, None], images, (own[1] / its[1])[:, None, None])


def _exported(name: str) -> Teacher:
    from penstock.export import export_folder, load_classifier, read_about

    folder = export_folder(Path(name))
    found = load_classifier(folder)
    backbone = found.backbone
    about = read_about(folder)
    return Teacher(
        name,
        _Exported(found),
        found.classes,
        backbone.size,
        backbone.mean.tolist(),
        backbone.std.tolist(),
        float(about.get("smoothing", 0.0)),
        {key: about[key] for key in ("backbone", "head")},
    )


def _timm(name: str) -> Teacher:
    from timm.models import get_model_args

    model, classes = open_timm(name)
    about = model.pretrained_cfg
    made = {"architecture": about.get("architecture", name), **get_model_args(model)}
    size = tuple(about["input_size"][-2:])
    return Teacher(name, _Timm(model), classes, size, about["mean"], about["std"], made=made)


def _warn(message: str, *parts: Any) -> None:
    if distributed.is_main():
        log.warning(message, *parts)
