"""The network that becomes a file: normalisation, backbone and head, with all that its images and answers mean."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.backbones.fold import fold_batchnorm
from penstock.backbones.weights import WEIGHTS_FILE
from penstock.errors import InputError
from penstock.evaluate._classifier import prepared
from penstock.evaluate._commands import WHOLE_BELOW
from penstock.export import Classifier, load_classifier, load_export, read_about
from penstock.formats.about import About, Preprocessing


class Network(nn.Module):
    """uint8 images [B, C, H, W] to {"logits", "probabilities"} fp32 [B, K], or {"features"} fp32 [B, D].

    Attributes:
        classifier: a `Classifier`; for a backbone alone one that gives its pooled features.
    """

    def __init__(self, classifier: nn.Module, about: About):
        super().__init__()
        self.classifier, self.about = classifier, about

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        answers = self.classifier(images).float()
        if self.about.classes is None:
            return {"features": answers}
        return {"logits": answers, "probabilities": (answers / self.about.temperature).softmax(-1)}

    def answers(self, images: Tensor) -> Tensor:
        """Logits, or features."""
        return next(iter(self(images).values()))

    def example(self, batch: int = 2) -> Tensor:
        """Noise of the right shape, always the same."""
        shape = (batch, self.about.preprocessing.channels, *self.about.preprocessing.size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    @property
    def norms(self) -> int:
        """The number of batch norms."""
        return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())

    def fold(self) -> "Network":
        """Fold batch norm into the layers before it, in place, where that is exact.

        Raises:
            InputError: there is none, or none that can be folded.
        """
        norms = self.norms
        if norms == 0:
            raise InputError("--fold: the network has no batch norm to fold into convolutions; leave it out")
        folded = len(fold_batchnorm(self, self.example()))
        if folded == 0:
            raise InputError(
                f"--fold: 0 of {norms} batch norms can be folded into the layers before them; leave it out"
            )
        self.about = self.about.model_copy(update={"folded": folded})
        return self


def load_network(folder: Path) -> Network:
    """The network of an export, in eval mode and fp32 on the CPU.

    Raises:
        InputError: the folder is no export, or its weights are damaged.
    """
    about = read_about(folder)
    weights = {WEIGHTS_FILE: about["sha256"], **about.get("sha256_beside", {})}
    with torch.random.fork_rng(devices=[]):
        if "classes" in about:
            classifier = load_classifier(folder)
            described = About(
                classes=classifier.classes,
                temperature=classifier.temperature,
                preprocessing=_of_classifier(classifier),
                weights=weights,
            )
            return Network(_one_graph(classifier), described).eval()
        backbone = load_export(folder)
    described = About(classes=None, preprocessing=_of_backbone(backbone), weights=weights)
    return Network(_Pooled(_one_graph(backbone)), described).eval()


class _Pooled(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images).pooled


def _one_graph(module: nn.Module) -> Any:
    """Attention as torch's one operation, on whichever machine this runs: what executes the file chooses its kernel."""
    part: Any
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = True
    return module


def _of_classifier(classifier: Classifier) -> Preprocessing:
    from timm.data import resolve_data_config

    height, width = resolve_data_config(pretrained_cfg=classifier.preprocessing, use_test_size=True)["input_size"][-2:]
    options = prepared(classifier, height, None).config
    return _preprocessing(classifier.backbone, (height, width), options.crop_pct, options.interpolation)


def _of_backbone(backbone: Any) -> Preprocessing:
    """As `penstock evaluate` prepares images for features."""
    return _preprocessing(backbone, backbone.size, 1.0 if backbone.size[0] < WHOLE_BELOW else 0.875, "bicubic")


def _preprocessing(backbone: Any, size: tuple[int, int], crop_pct: float, interpolation: Any) -> Preprocessing:
    return Preprocessing(
        size=size,
        channels=backbone.config.channels,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=tuple(backbone.mean.tolist()),
        std=tuple(backbone.std.tolist()),
    )
