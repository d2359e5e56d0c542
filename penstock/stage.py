"""What `python -m pretrain` and `python -m finetune` share: the command line, and a run from a recipe."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from penstock.checkpoint import Checkpoints
from penstock.ema import Average
from penstock.engine import Engine
from penstock.errors import DONE, EXIT_FILE, INPUT_WRONG, InputError, RunFailed
from penstock.mistakes import fields_of
from penstock.monitor import Monitor
from penstock.optim import Optim
from penstock.recipe import DEFAULT, Block, Rule, Source, check, load, one_of, resolved, several_of, to_yaml
from penstock.schedule import Duration, Length, knobs_of
from penstock.streams.data import Data
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.storage import is_remote
from penstock.tracking import Tracker

PATIENCE = 3.0  # seconds that other ranks leave rank 0 to say what is wrong


def optimizer_sees_shapes(recipe: Any) -> Iterator[str]:
    if recipe.optim.needs_shapes and recipe.engine.zero > 0:
        cautious = "caution" if "caution" in recipe.optim.options else recipe.optim.name
        yield (
            f"optim.name: {cautious} needs whole parameters, which ZeRO-{recipe.engine.zero} cuts into flat "
            "pieces; set engine.zero=0, or optim.name=adamw"
        )


def weights_have_a_start(recipe: Any) -> Iterator[str]:
    if recipe.optim.pulls and recipe.backbone.weights is None:
        yield (
            "optim.l2_sp: it pulls the backbone to the weights it starts from, and these are random here; "
            "give backbone.weights, or leave l2_sp at 0"
        )


def pool_stays_the_same(recipe: Any) -> Iterator[str]:
    """The views of a fixed pool come again and again, so nothing may change them on the way."""
    if recipe.data.pool is None:
        return
    moving = [name for name, knob in knobs_of(recipe.augment).items() if not isinstance(knob, (int, float))]
    for name in moving:
        yield (
            f"augment.{name}: it follows a curve, and the {recipe.data.pool} views of data.pool stay as they are; "
            "write one number, or data.pool=null"
        )
    if recipe.batch_growth > 1:
        yield "batch_growth: it goes with views that grow, and those of data.pool do not; leave it at 1"


def evaluations_have_data(recipe: Any) -> Iterator[str]:
    if recipe.evaluate_blocks() and recipe.data.val is None:
        yield "data.val: evaluate needs a validation set; give a packed one, or leave evaluations out (evaluate=null)"


def early_stopping_has_measurements(recipe: Any) -> Iterator[str]:
    early, blocks = recipe.monitor.stop_early, recipe.evaluate_blocks()
    if early is None or not early.metric.startswith("eval/") or early.metric in recipe.own_metrics:
        return
    name = next((name for name in blocks if early.metric.startswith(f"eval/{name}_")), None)
    if name is None:
        known = [*sorted(recipe.own_metrics), *(f"eval/{name}_..." for name in blocks)]
        remedy = f"take one of {', '.join(known)}" if known else "add an evaluation, such as evaluate.knn"
        yield f"monitor.stop_early.metric: nothing measures {early.metric}; {remedy}"
    elif blocks[name].every is None:
        yield (
            f"evaluate.{name}.every: stopping early goes by {early.metric}, measured at the start and the end alone; "
            "give '1 epochs', say"
        )


def inputs_are_here(recipe: Any) -> Iterator[str]:
    """What a run reads; a login node need not hold it."""
    yield from recipe.absent()


class Recipe(Block):
    """The blocks every stage has; a stage adds its own."""

    name: str = Field(description="the run's name, and its folder under `out`")
    out: Path = Field(Path("runs"), description="folder of all runs")
    seed: int = Field(0, ge=0, description="of weights, order, augmentation and masks")
    duration: Duration = Field(description="how long to train: steps, epochs or samples")
    batch: int = Field(gt=0, description="samples per optimizer step, over all ranks and micro-batches")
    batch_growth: float = Field(
        1.0, ge=1, description="most times the batch that a step takes while views are smaller than at the end"
    )
    data: Data.Config
    augment: one_of("penstock.augment")  # type: ignore[valid-type]
    optim: Optim.Config
    engine: Engine.Config = Engine.Config()
    average: Average.Config = Average.Config()
    evaluate: several_of("penstock.evaluate") = Field({}, description="evaluations by name")  # type: ignore[valid-type]
    monitor: Monitor.Config = Monitor.Config()
    checkpoint: Checkpoints.Config = Checkpoints.Config()
    tracking: Tracker.Config = Tracker.Config()

    rules: ClassVar[tuple[Rule, ...]] = (
        optimizer_sees_shapes,
        weights_have_a_start,
        pool_stays_the_same,
        evaluations_have_data,
        early_stopping_has_measurements,
        inputs_are_here,
    )
    own_metrics: ClassVar[frozenset[str]] = frozenset()  # what the stage measures by itself, as it is tracked

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        if not name or name.startswith(".") or "/" in name:
            raise ValueError("a run's name is the name of its folder: letters, digits, - and _")
        return name

    @field_validator("duration")
    @classmethod
    def _absolute(cls, duration: Length) -> Length:
        if duration.unit == "%" or duration.amount <= 0:
            raise ValueError("the run's own length is given in steps, epochs or samples, such as '100 epochs'")
        return duration

    def evaluate_blocks(self) -> dict[str, Any]:
        """The evaluations that are on, by name."""
        blocks = self.evaluate if isinstance(self.evaluate, dict) else dict(self.evaluate or {})
        return {name: block for name, block in blocks.items() if block is not None}

    def absent(self) -> Iterator[str]:
        """What the run would read and is not on this machine, as a rule says it. A stage adds its own."""
        for key, address in self.data.places():
            if is_remote(address):
                try:
                    Manifest.load(address, self.data.remote)
                except InputError as error:
                    yield f"{key}: {error}"
            elif not Path(address).exists():
                yield f"{key}: there is no {address} here; pack it with `penstock shards pack IMAGES {address}`"
        weights = self.backbone.weights  # type: ignore[attr-defined]
        if weights not in (None, "timm") and not Path(weights).expanduser().exists():
            yield f"backbone.weights: there is no file or folder {weights!r}; 'timm' loads timm's own weights"

    @property
    def folder(self) -> Path:
        return self.out / self.name


Start = Callable[[Any, bool], int]  # a checked recipe, and whether only to look for a learning rate


def main(stage: str, model: type[Recipe], start: Start, argv: Sequence[str] | None = None) -> int:
    """Run a stage's command line; its exit code: 0 done, 2 the input is wrong, 3 diverged, 75 stopped and resumable."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {stage}",
        description=f"Run a {stage} recipe. Any value can be given on the command line as key=value.",
        add_help=False,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    parser.add_argument("--check", action="store_true", help="only say whether the recipe can run")
    parser.add_argument("--explain", action="store_true", help="print every value and where it came from")
    parser.add_argument("--resolved", action="store_true", help="print the recipe with every value written out")
    parser.add_argument(
        "--find-lr", action="store_true", help="only try learning rates on the run's first images, and suggest one"
    )
    parser.add_argument("--help", "-h", action="store_true", help="this text, and everything a recipe can set")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.help or args.recipe is None:
            parser.print_help()
            _print_keys(model, load(args.recipe, args.overrides) if args.recipe else None)
            return DONE if args.help else INPUT_WRONG
        source = load(args.recipe, args.overrides)
        looking = args.check or args.explain or args.resolved  # a login node need not hold the data
        recipe = check(model, source, without=(inputs_are_here,) if looking else ())
        if args.explain:
            _explain(recipe, source)
        if args.resolved:
            print(to_yaml(recipe), end="")
        if args.check:
            print(f"{args.recipe}: good. {recipe.name}: {recipe.duration} in batches of {recipe.batch}")
        if args.check or args.resolved:
            for absent in inputs_are_here(recipe):
                print(f"but {absent}", file=sys.stdout if args.check else sys.stderr)
        return DONE if looking else exit_code(start(recipe, args.find_lr))
    except InputError as error:
        return exit_code(INPUT_WRONG, f"{stage}: {error}")
    except RunFailed as error:
        return exit_code(RunFailed.code, f"{stage}: {error}")


def exit_code(code: int, message: str = "") -> int:
    """Say the message once, though every rank may have it, and tell the launcher the code."""
    if os.environ.get("RANK", "0") != "0":
        if message:
            # Rank 0 has most likely failed in the same way, and this rank is ended before it repeats the words.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
            print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)
        return code
    if message:
        print(message, file=sys.stderr, flush=True)
    if EXIT_FILE in os.environ:
        Path(os.environ[EXIT_FILE]).write_text(str(code), encoding="utf-8")
    return code


def _explain(recipe: Recipe, source: Source) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from penstock.recipe import flatten

    given = dict(flatten(source.values))
    table = Table("key", "value", "from", box=None, pad_edge=False)
    for key, value in flatten(resolved(recipe)):
        shown = json.dumps(value) if not isinstance(value, str) else value
        table.add_row(key, escape(shown), source.origin(key) if key in given else DEFAULT)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _print_keys(model: type[Recipe], source: Source | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from penstock.recipe import Choice, Choices, concrete
    from penstock.registry import Registry

    shown = concrete(model, source.values, {}) if source else model
    table = Table("key", "default", "what it is", box=None, pad_edge=False)
    for key, info, _ in fields_of(shown):
        marks = [mark for mark in info.metadata if isinstance(mark, (Choice, Choices))]
        about = info.description or ""
        if marks:
            about = f"{about} one of: {', '.join(Registry(marks[0].package).names())}; name it for its keys".strip()
        default = "required" if info.is_required() else str(info.get_default(call_default_factory=True))
        if marks and info.is_required():
            default = getattr(marks[0], "default", None) or default
        table.add_row(key, escape(default), escape(about))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print("\nWhat a recipe can set (give a RECIPE to see the keys of the components it names):")
    console.print(table)


def save_recipe(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Write the resolved recipe into the run folder; what differs from the recipe of the attempt before."""
    import yaml

    from penstock.recipe import difference

    path = recipe.folder / "recipe.yaml"
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    recipe.folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(to_yaml(recipe), encoding="utf-8")
    partial.replace(path)
    return difference(before, resolved(recipe)) if before is not None else {}


def since_launch() -> float:
    """Seconds since the command was given: the launcher's start, or else this process's."""
    began = os.environ.get("PENSTOCK_BEGAN")
    return time.time() - float(began) if began else time.clock_gettime(time.CLOCK_BOOTTIME) - _process_start()


def _process_start() -> float:
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
