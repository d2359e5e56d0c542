"""Supervised classification."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from finetune.tasks import Pieces
from penstock.backbones.batchnorm import set_valid
from penstock.recipe import Block
from penstock.schedule import knobs_of
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.sidecar import Sidecar
from penstock.task import StepOutput, Task, weighted_mean


class Classify(Task):
    """Labels become soft targets (smoothed by the loss), images are mixed with them, logits are compared."""

    class Config(Block):
        name: Literal["classify"] = "classify"

    @classmethod
    def knobs(cls, config: Any) -> dict[str, Any]:
        """Numbers or curves that `forward` gets, by name."""
        return knobs_of(config)

    @classmethod
    def smoothing(cls, recipe: Any) -> float:
        """How much the labels that it learns from are smoothed."""
        return float(getattr(recipe.loss, "smoothing", 0.0))

    @classmethod
    def absent(cls, recipe: Any) -> Iterator[str]:
        """What it would read and is not on this machine: the key, and what to do."""
        return iter(())

    def __init__(self, config: Any, pieces: Pieces):
        super().__init__()
        self.config, self.pieces = config, Apart(**vars(pieces))
        self.backbone, self.head = pieces.backbone, pieces.head

    def sidecar(self, recipe: Any, data: Data) -> Sidecar | None:
        """What it needs beside the training views."""
        return None

    def before_step(self, time: float, knobs: Mapping[str, float]) -> None:
        self.pieces.transfer.set_mode(self, time)
        self.pieces.drop.set({name.removeprefix("drop_"): value for name, value in knobs.items() if "drop_" in name})

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        images, targets = self.mixed(batch, knobs)
        logits = self.logits(images)
        return self.output(logits, targets, self.pieces.loss(logits, targets), batch)

    def mixed(self, batch: Batch, knobs: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Normalised images [B, C, H, W] and soft targets [B, K], mixed alike."""
        pieces = self.pieces
        set_valid(self, batch.weights)
        targets = pieces.loss.targets(batch.labels, len(pieces.classes))
        images = self.backbone.normalize(batch.views[0])
        return pieces.mixing(images, targets, batch.positions, batch.weights, knobs, batch.begin)

    def logits(self, images: Tensor) -> Tensor:
        """fp32 [B, K], of uint8 or normalised images."""
        return self.head(self.backbone(images))

    def output(self, logits: Tensor, targets: Tensor, losses: Tensor, batch: Batch) -> StepOutput:
        """The mean loss, and how often the answer is the class with the largest share of the target."""
        right = logits.detach().argmax(1) == targets.argmax(1)
        name = "top1_mixed" if self.pieces.mixes else "top1"  # on mixed images it says little of the others
        metrics = {name: 100 * weighted_mean(right.float(), batch.weights)}
        return StepOutput(weighted_mean(losses, batch.weights), batch.weights.sum(), metrics)


class Apart:
    """Holds what a task uses and is no part of it: not of its weights, of checkpoints, or of averaged copies."""

    def __init__(self, **held: Any):
        self.__dict__.update(held)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Apart":
        return self
