"""A pretraining run, put together from its recipe."""

from pathlib import Path
from typing import Any

import torch

from penstock import distributed
from penstock.augment import AUGMENTATIONS
from penstock.backbones import Backbone
from penstock.checkpoint import Checkpoints
from penstock.engine import Engine, start_ranks
from penstock.errors import DONE, STOPPED, InputError
from penstock.keyed import key
from penstock.meters import Meters
from penstock.monitor import Monitor
from penstock.optim import Optim
from penstock.recipe import resolved
from penstock.schedule import Clock, Curves, knobs_of
from penstock.signals import Stop
from penstock.stage import save_recipe, since_launch
from penstock.streams.data import Data
from penstock.streams.train import TrainStream
from penstock.tracking import Tracker
from penstock.trainer import Run, fit
from pretrain.recipe import METHODS, Pretrain

INIT = 0x1417  # the stream of random numbers that weights start from


def start(recipe: Pretrain) -> int:
    """Pretrain, then export the backbone. The exit code."""
    stop = Stop(recipe.folder)
    stop.listen()
    data = Data(recipe.data)
    clock = Clock.of(recipe.duration, recipe.batch, data.train.samples)
    start_ranks()
    if recipe.batch > data.train.samples:
        raise InputError(
            f"batch {recipe.batch} is larger than the training set of {data.train.samples} images; make it smaller"
        )
    augment = AUGMENTATIONS.get(recipe.augment.name)(recipe.augment)
    stream = TrainStream(
        recipe.data,
        augment,
        batch=recipe.batch,
        accumulation=recipe.engine.accumulation,
        rank=distributed.rank(),
        world=distributed.world(),
        seed=recipe.seed,
        clock=clock,
        device_type=distributed.device().type,
    )
    torch.manual_seed(key(recipe.seed, INIT))
    task = METHODS.get(recipe.method.name)(recipe.method, Backbone(recipe.backbone), recipe.seed)
    stream.size_multiple = task.backbone.patch[0] if task.backbone.patch else 1
    micro_batch = recipe.batch // distributed.world() // recipe.engine.accumulation
    engine = Engine(task, Optim(recipe.optim).build(task, recipe.batch), recipe.engine, micro_batch)
    tracker = _tracker(recipe, data)
    meters = Meters()
    try:
        monitor = Monitor(recipe.monitor, recipe.evaluate_blocks(), data, engine, tracker, clock, meters)
        curves = Curves(
            {"lr": recipe.optim.schedule, "weight_decay": recipe.optim.weight_decay, **knobs_of(recipe.method)},
            clock,
            scale={"lr": recipe.optim.peak(recipe.batch)},
        )
        finished = fit(
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
                observe=monitor.observe,
                meters=meters,
            )
        )
        if finished:
            _finish(recipe, engine, tracker, monitor, clock)
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED" if finished else "KILLED")
    return DONE if finished else STOPPED


def _tracker(recipe: Pretrain, data: Data) -> Tracker:
    changed: dict[str, Any] = save_recipe(recipe) if distributed.is_main() else {}
    tags = {"stage": "pretrain", "arch": recipe.backbone.name, "method": recipe.method.name}
    params = resolved(recipe)
    tracker = Tracker(recipe.tracking, recipe.folder, recipe.name, params, tags, active=distributed.is_main())
    tracker.dataset("train", data.train.identity, str(recipe.data.train))
    if data.val is not None:
        tracker.dataset("val", data.val.identity, str(recipe.data.val), context="validation")
    for name, (before, now) in changed.items():
        print(f"note: {name} was {before} in the attempt before and is {now} now", flush=True)
    tracker.log(0, {"perf/seconds_to_start": since_launch()})
    return tracker


def _finish(recipe: Pretrain, engine: Engine, tracker: Tracker, monitor: Monitor, clock: Clock) -> None:
    from penstock.export import export_backbone

    weights = engine.weights("backbone.model.")
    if distributed.is_main():
        state = {name.removeprefix("backbone."): value for name, value in weights.items()}
        about = {"run": recipe.name, "method": recipe.method.name, "step": clock.total}
        folder = export_backbone(state, recipe.backbone, Path(recipe.folder) / "export", about)
        tracker.tag("export", str(folder))
        tracker.artifact(folder / "config.json")
    tracker.log(clock.total, {f"final/{name.partition('/')[2]}": v for name, v in monitor.latest.items()})
