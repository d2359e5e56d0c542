"""Gradual unfreezing (Howard and Ruder 2018, ULMFiT): the head trains first, then the backbone opens from the top."""

from itertools import pairwise
from typing import Literal

from pydantic import Field

from finetune.transfer import Transfer
from finetune.transfer._layers import layers, modules_of
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Clock, Duration, Length
from penstock.task import Task


class Gradual(Transfer):
    """The backbone's layers are cut into as many parts as `at` has times, as equal as can be.

    Parameters keep their gradient all along, since ZeRO 1 and 2 never train what is unfrozen later; before its time a
    part has learning rate and weight decay 0. Adam's moments thus know the gradient when a part opens, and its first
    steps are no larger than later ones.
    """

    class Config(Block):
        name: Literal["gradual"] = "gradual"
        at: tuple[Duration, ...] = Field(
            tuple(Length(percent, "%") for percent in (10.0, 20.0, 30.0, 40.0)),
            min_length=1,
            description="when the parts of the backbone open, from the topmost down",
        )

    def prepare(self, task: Task, clock: Clock) -> None:
        self.closed = {
            f"backbone.model.{name}": time
            for time, part in self._parts(task, clock)
            for name in modules_of(task.backbone.model, part)
        }

    def opens(self, task: Task, clock: Clock) -> dict[str, float]:
        return {f"backbone.model.{name}": time for time, part in self._parts(task, clock) for name in part}

    def _parts(self, task: Task, clock: Clock) -> list[tuple[float, set[str]]]:
        """(nominal time, names of parameters within the model), from the top down."""
        times = [clock.steps(each) for each in self.config.at]
        if any(after <= before for before, after in pairwise(times)) or times[-1] >= clock.total:
            shown = ", ".join(f"{time:g}" for time in times)
            raise InputError(
                f"transfer.at: the parts open at steps {shown} of {clock.total}; the times must grow and lie before "
                "the end of the run"
            )
        downward = layers(task.backbone.model)[::-1]
        if len(times) > len(downward):
            raise InputError(
                f"transfer.at: {len(times)} times for {len(downward)} layers; give at most one time for each layer"
            )
        bounds = [round(index * len(downward) / len(times)) for index in range(len(times) + 1)]
        return [
            (time, {name for layer in downward[first:last] for name in layer})
            for time, (first, last) in zip(times, pairwise(bounds), strict=True)
        ]
