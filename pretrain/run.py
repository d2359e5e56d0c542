"""A pretraining run."""

from typing import Any

from penstock import distributed
from penstock.assembly import Parts, run
from penstock.backbones import Backbone
from penstock.monitor import Measure, Monitor
from penstock.schedule import Clock, knobs_of
from penstock.streams.data import Data
from penstock.task import Task
from pretrain.recipe import METHODS, Pretrain


def start(recipe: Pretrain, find_lr: bool = False) -> int:
    """Pretrain, then export the backbone. The exit code."""
    return run(recipe, Pretraining(recipe), find_lr)


class Pretraining:
    """What pretraining adds to a run (a `Stage`)."""

    name = "pretrain"

    def __init__(self, recipe: Pretrain):
        self.recipe = recipe

    def task(self, data: Data, clock: Clock) -> Task:
        recipe = self.recipe
        return METHODS.get(recipe.method.name)(recipe.method, Backbone(recipe.backbone), recipe.seed)

    def sidecar(self, data: Data) -> None:
        return None

    def opens(self, task: Task, clock: Clock) -> dict[str, float]:
        return {}

    def knobs(self) -> dict[str, Any]:
        return knobs_of(self.recipe.method)

    def tags(self) -> dict[str, str]:
        return {"arch": self.recipe.backbone.name, "method": self.recipe.method.name}

    def measures(self, parts: Parts) -> list[Measure]:
        return []

    def keep(self, parts: Parts, step: int) -> None:
        self._export(parts, step, "best")

    def finish(self, parts: Parts, monitor: Monitor, step: int) -> None:
        self._export(parts, step, "export")

    def _export(self, parts: Parts, step: int, name: str) -> None:
        from penstock.export import export_backbone

        weights = parts.weights("backbone.model.")
        if distributed.is_main():
            state = {name.removeprefix("backbone."): value for name, value in weights.items()}
            about = {"run": self.recipe.name, "method": self.recipe.method.name, "step": step}
            folder = export_backbone(state, self.recipe.backbone, self.recipe.folder / name, about)
            parts.tracker.tag(name, str(folder))
            parts.tracker.artifact(folder / "config.json")
