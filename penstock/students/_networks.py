"""Which networks are compared, and what their runs say of how they were trained."""

import atexit
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from penstock.adopt import TIMM, adopt
from penstock.class_names import check_classes
from penstock.errors import InputError
from penstock.export import export_folder, read_about

TEACHER, ALONE, DISTILLED, UNKNOWN = "teacher", "alone", "distilled", "unknown"  # how a network was trained
ROLES = {"classify": ALONE, "distill": DISTILLED}  # by the recipe's task
INSIDE = ("export", "best")  # folders of a run that are exports
BUDGET = (
    "duration",
    "batch",
    "data.train",
    "data.labels",
    "data.repeats",
    "data.pool",
    "augment.size",
)  # keys of a recipe


@dataclass(frozen=True)
class Entry:
    """A row of the report: one network, perhaps of several runs that differ in their seed alone."""

    name: str
    places: tuple[str, ...]  # run or export folders


def entry(text: str, name: str | None = None) -> Entry:
    """A row from the command line: `RUN`, or `NAME=RUN,RUN,RUN`; `name` goes before."""
    given, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        given, rest = "", text
    places = (
        (rest,)
        if rest and (Path(rest).exists() or rest.startswith(TIMM))
        else tuple(place for place in rest.split(",") if place)
    )
    if not places:
        raise InputError(f"{text!r} names no run; write a folder, or NAME=RUN,RUN for runs of one network")
    if len(places) > 1 and not (given or name):
        raise InputError(f"{text!r}: give runs of one network a name, as NAME={text}")
    if len({Path(place).resolve() for place in places}) < len(places):
        raise InputError(f"{text!r} names a run twice, which would make it look surer than it is")
    found = name or given or _name(places[0])
    if not re.fullmatch(r"\w[\w .-]*", found):
        raise InputError(f"{found!r} cannot name a network; take letters, digits, spaces and . - _")
    return Entry(found, places)


def _name(place: str) -> str:
    folder = Path(place).resolve()
    name = folder.parent.name if folder.name in INSIDE else folder.name
    return re.sub(r"[^\w .-]", "-", name).lstrip(" .-") or "network"


@dataclass(frozen=True)
class Network:
    """One trained network and its history, as far as its files tell."""

    place: str
    export: Path
    about: Mapping[str, Any]  # the export's own description
    recipe: Mapping[str, Any] = field(default_factory=dict)  # of its run; empty where only an export is there

    @classmethod
    def open(cls, place: str) -> "Network":
        """Raises InputError where there is no classifier at `place`."""
        export = export_folder(_adopted(place) if place.startswith(TIMM) else Path(place))
        about = read_about(export)
        if "classes" not in about:
            raise InputError(f"{export} is the export of a backbone, without a classifier; give a finetuned one")
        run = export.parent / "recipe.yaml"
        recipe = _recipe(run) if export.name in INSIDE and run.is_file() else {}
        return cls(place, export, about, recipe)

    @property
    def role(self) -> str:
        return ROLES.get(str(self._task.get("name", self.about.get("task"))), UNKNOWN)

    @property
    def how(self) -> str:
        """The losses that a distilled network learned from, as `soft_targets + dist`."""
        losses = self._task.get("losses")
        on = [str(name) for name, block in losses.items() if block] if isinstance(losses, Mapping) else []
        return " + ".join(on) if self.role == DISTILLED else ""

    @property
    def teacher(self) -> str | None:
        """As the recipe names it."""
        name = self._task.get("teacher")
        return name if isinstance(name, str) else None

    @property
    def seed(self) -> int | None:
        seed = self.recipe.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def architecture(self) -> str:
        """Equal for networks that differ in training alone; a distillation token does not make another student."""
        backbone = {key: self.about["backbone"].get(key) for key in ("name", "size", "channels", "options", "pool")}
        backbone["name"] = str(backbone["name"]).partition(".")[0].replace("_distilled", "")
        head = str(self.about["head"].get("kind")).replace("distilled", "linear")
        return json.dumps([backbone, head], sort_keys=True)

    @property
    def budget(self) -> dict[str, Any]:
        """What it was trained with and for how long; empty where no recipe tells."""
        return {key: _at(self.recipe, key) for key in BUDGET} if self.recipe else {}

    @property
    def _task(self) -> Mapping[str, Any]:
        task = self.recipe.get("task")
        return task if isinstance(task, Mapping) else {}


@dataclass(frozen=True)
class Group:
    """The networks of one row."""

    name: str
    networks: tuple[Network, ...]

    @classmethod
    def open(cls, given: Entry) -> "Group":
        """Raises InputError where one cannot be opened, or where they are not runs of one network."""
        first, *others = networks = tuple(Network.open(place) for place in given.places)
        for other in others:
            for what, own, its in (
                ("architecture", first.architecture, other.architecture),
                ("training", (first.role, first.how), (other.role, other.how)),
                ("budget", first.budget, other.budget),
            ):
                if own != its:
                    raise InputError(
                        f"{given.name}: {first.place} and {other.place} differ in {what}, not in the seed alone; "
                        "give them as two students"
                    )
        return cls(given.name, networks)

    @property
    def first(self) -> Network:
        return self.networks[0]

    @property
    def role(self) -> str:
        return self.first.role


@cache
def _adopted(name: str) -> Path:
    """timm's model as an export, in a folder that goes with this process."""
    keeper = tempfile.TemporaryDirectory(prefix="penstock-")
    atexit.register(keeper.cleanup)
    return adopt(name, Path(keeper.name) / "adopted")


def same_classes(teacher: Network, other: Network) -> None:
    """Raises InputError naming the first difference."""
    remedy = "finetune both on data with the same folders of classes"
    check_classes(teacher.about["classes"], other.about["classes"], other.place, "the teacher", remedy)


def taught_by(student: Network, teacher: Network) -> bool | None:
    """Whether the student's own teacher was this one; None where that is not known."""
    if student.teacher is None or student.teacher.startswith("timm:"):
        return None
    try:
        return Network.open(student.teacher).about["sha256"] == teacher.about["sha256"]
    except InputError:  # it has gone
        return None


def _recipe(file: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, Mapping) else {}


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
