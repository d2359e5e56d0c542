"""A run put together from its recipe: what the stages share."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock import distributed, lr_finder
from penstock.augment import AUGMENTATIONS
from penstock.backbones import Backbone
from penstock.checkpoint import Checkpoints
from penstock.ema import Average
from penstock.engine import Engine, start_ranks
from penstock.errors import DONE, STOPPED, InputError
from penstock.frozen import FrozenFeatures
from penstock.keyed import key
from penstock.meters import Meters
from penstock.monitor import Measure, Monitor, eval_stream
from penstock.optim import Optim
from penstock.recipe import resolved
from penstock.schedule import Clock, Curves
from penstock.signals import Stop
from penstock.stage import Recipe, save_recipe, since_launch
from penstock.streams.data import Data
from penstock.streams.evaluation import EvalStream
from penstock.streams.positions.mixture import labelled, places_of
from penstock.streams.sidecar import Sidecar
from penstock.streams.train import TrainStream
from penstock.task import Task
from penstock.tracking import Tracker
from penstock.trainer import Run, fit

INIT = 0x1417  # the stream of random numbers that weights start from


@dataclass
class Parts:
    """What a stage finds when it measures and finishes."""

    recipe: Any
    data: Data
    clock: Clock
    engine: Engine
    meters: Meters
    tracker: Tracker
    train: EvalStream  # the training set as it is measured
    val: EvalStream | None
    average: Average | None = None

    @property
    def task(self) -> Task:
        """The task to measure and export: averaged, once there is an average."""
        return self.average.module if self.average is not None and self.average.updates else self.engine.task

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights of `task` by name, on the CPU. Collective."""
        if self.average is not None and self.average.updates:
            return self.average.weights(prefix)
        return self.engine.weights(prefix)


class Stage(Protocol):
    """What a stage adds to a run."""

    name: str

    def task(self, data: Data, clock: Clock) -> Task:
        """The model with its loss; torch's generator is seeded."""
        ...

    def sidecar(self, data: Data) -> Sidecar | None:
        """What is handed over beside the training views; asked for after the task was made."""
        ...

    def opens(self, task: Any, clock: Clock) -> dict[str, float]:
        """Parameters that move only from a nominal time on, by name."""
        ...

    def knobs(self) -> dict[str, Any]:
        """Numbers or curves that the task's `forward` gets, by name."""
        ...

    def tags(self) -> dict[str, str]:
        """Of the tracked run."""
        ...

    def measures(self, parts: Parts) -> list[Measure]:
        """What it measures besides the recipe's evaluations of frozen features."""
        ...

    def keep(self, parts: Parts, step: int) -> None:
        """Export the model as it is, the best so far, where the run may stop early. Collective."""
        ...

    def finish(self, parts: Parts, monitor: Monitor, step: int) -> None:
        """After the last step: exports and final figures. Collective."""
        ...


def run(recipe: Recipe, stage: Stage, find_lr: bool = False) -> int:
    """Train to the end, or until asked to stop, or only look for a learning rate; the exit code."""
    if find_lr and Checkpoints(recipe.checkpoint, recipe.folder).found():
        raise InputError(
            f"--find-lr tries rates on a run that has not begun, and {recipe.folder} holds checkpoints; "
            "give another name (name=...)"
        )
    stop = Stop(recipe.folder)
    stop.listen()
    data = Data(recipe.data, recipe.seed)
    clock = Clock.of(recipe.duration, recipe.batch, data.part.samples)
    start_ranks()
    if recipe.batch > data.part.samples:
        raise InputError(
            f"batch {recipe.batch} is larger than the training set of {data.part.samples} images; make it smaller"
        )
    torch.manual_seed(key(recipe.seed, INIT))
    task = stage.task(data, clock)
    stream = _stream(recipe, clock, task.backbone, stage.sidecar(data))
    average = Average(recipe.average, task) if recipe.average.name != "none" else None
    engine = Engine(
        task,
        Optim(recipe.optim).build(task, recipe.batch, stage.opens(task, clock)),
        recipe.engine,
        recipe.batch // distributed.world() // recipe.engine.accumulation,
    )
    tracker, meters = _tracker(recipe, data, stage), Meters()
    try:
        size = task.backbone.size
        train = eval_stream(recipe.monitor, data, data.train, size, engine.device.type, labelled(data.train))
        val = eval_stream(recipe.monitor, data, data.val, size, engine.device.type) if data.val else None
        parts = Parts(recipe, data, clock, engine, meters, tracker, train, val, average)
        measures = stage.measures(parts)
        if recipe.evaluate_blocks():
            assert val is not None  # a rule of the recipe
            blocks = recipe.evaluate_blocks()
            measures.append(FrozenFeatures(blocks, lambda: parts.task.backbone, engine, train, val, meters))

        def pictures() -> dict[str, Tensor]:
            with engine.autocast():
                return engine.task.pictures(next(iter(val or train)).to(engine.device))

        monitor = Monitor(recipe.monitor, measures, tracker, pictures, lambda step: stage.keep(parts, step))
        curves = Curves(
            {**recipe.optim.knobs, **stage.knobs()},
            clock,
            scale={"lr": recipe.optim.peak},
        )
        if find_lr:
            lr_finder.report(lr_finder.find_lr(engine, stream, curves, seed=recipe.seed), recipe.folder, tracker)
            tracker.close("KILLED")
            return DONE
        finished, step = fit(
            Run(
                engine=engine,
                stream=stream,
                curves=curves,
                clock=clock,
                tracker=tracker,
                report_every=recipe.tracking.every,
                checkpoints=Checkpoints(recipe.checkpoint, recipe.folder),
                folder=recipe.folder,
                seed=recipe.seed,
                stop=stop,
                monitor=monitor,
                meters=meters,
                average=average,
            )
        )
        if finished:
            stage.finish(parts, monitor, step)
            final = {f"final/{name.partition('/')[2]}": value for name, value in monitor.latest.items()}
            tracker.log(step, final)
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED" if finished else "KILLED")
    return DONE if finished else STOPPED


def _stream(recipe: Recipe, clock: Clock, backbone: Backbone, sidecar: Sidecar | None = None) -> TrainStream:
    return TrainStream(
        recipe.data,
        AUGMENTATIONS.get(recipe.augment.name)(recipe.augment),
        batch=recipe.batch,
        accumulation=recipe.engine.accumulation,
        rank=distributed.rank(),
        world=distributed.world(),
        seed=recipe.seed,
        clock=clock,
        device_type=distributed.device().type,
        size_multiple=backbone.size_multiple,
        growth=recipe.batch_growth,
        sidecar=sidecar,
    )


def _tracker(recipe: Recipe, data: Data, stage: Stage) -> Tracker:
    changed: dict[str, Any] = save_recipe(recipe) if distributed.is_main() else {}
    tags = {"stage": stage.name, **stage.tags()}
    params = resolved(recipe)
    tracker = Tracker(recipe.tracking, recipe.folder, recipe.name, params, tags, active=distributed.is_main())
    tracker.dataset("train", data.train.identity, ", ".join(address for _, address in places_of("", recipe.data.train)))
    if data.val is not None:
        tracker.dataset("val", data.val.identity, str(recipe.data.val), context="validation")
    for name, (before, now) in changed.items():
        print(f"note: {name} was {before} in the attempt before and is {now} now", flush=True)
    tracker.log(0, {"perf/seconds_to_start": since_launch()})
    return tracker
