"""A teacher's answers as a cache holds them: how they are written down, restored, and tied to what made them."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from penstock import distributed
from penstock.augment import AUGMENTATIONS, Boxed
from penstock.errors import InputError
from penstock.recipe import flatten
from penstock.streams.reader import ShardReader
from penstock.streams.sets.atomic import replacing
from penstock.streams.sets.manifest import MANIFEST, Manifest
from penstock.streams.sidecar import PackedSidecar

if TYPE_CHECKING:
    from finetune.teachers import Teacher

VERSION = 2
CACHE = "cache.json"
STEPS = 65_535  # of 16 bits, from log-probability 0 down to the lowest one of an answer
MAKE = "make it with `python -m finetune.teacher RECIPE --out {}`"
log = logging.getLogger(__name__)


def conflicts(recipe: Any) -> Iterator[str]:
    """What in a recipe cached answers cannot go with; each says the key, the value and what to write instead."""
    if not isinstance(recipe.data.train, str):
        yield "data.train: cached answers belong to one packed set, and these are several; let the teacher run"
    if recipe.data.pool is None:
        yield "data.pool: cached answers belong to views that come again; say how many each sample has, such as 10"
    if recipe.data.stages:
        yield "data.stages: cached answers are for views that no stage has changed; remove them, or the cache"
    for name in ("mixup", "cutmix"):
        if getattr(recipe.mix, name) != 0:
            yield (
                f"mix.{name}: the cached teacher answered single images, and says nothing of mixed ones; set "
                f"mix.{name}=0, or let the teacher run (without a cache)"
            )
    if recipe.mix.auto:
        yield "mix.auto: the cached teacher answered single images, and says nothing of mixed ones; set mix.auto=false"


# What an answer belongs to ---------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """All that decides which pixels a teacher saw, and what it answered."""

    teacher: str  # digest of its weights
    classes: tuple[str, ...]
    augment: Mapping[str, Any]
    pool: int
    channels: int
    decode: str
    data: str  # identity of the training set's manifest

    @classmethod
    def of(cls, recipe: Any, teacher: "Teacher", classes: Sequence[str], data: Manifest) -> "Identity":
        """What a recipe with `data.pool`, and without curves on its augmentation, asks for."""
        return cls(
            teacher=teacher.digest(),
            classes=tuple(classes),
            augment=recipe.augment.model_dump(mode="json"),
            pool=recipe.data.pool,
            channels=recipe.data.channels,
            decode=_decode(recipe, data),
            data=data.identity,
        )

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> "Identity":
        """Raises KeyError or TypeError where `values` are those of no identity."""
        return cls(**{**values, "classes": tuple(values["classes"])})

    def differences(self, wanted: "Identity") -> list[str]:
        """What another one asks for instead, in words."""
        words = []
        if self.teacher != wanted.teacher:
            words.append(f"another teacher (its weights are {self.teacher[:12]}, task.teacher's {wanted.teacher[:12]})")
        if self.classes != wanted.classes:
            words.append(_of_classes(self.classes, wanted.classes))
        mine, theirs = (dict(flatten({"augment": dict(each.augment)})) for each in (self, wanted))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                words.append(f"{key}: {mine.get(key)} instead of {theirs.get(key)}")
        for name, key in (("pool", "data.pool"), ("channels", "data.channels")):
            if getattr(self, name) != getattr(wanted, name):
                words.append(f"{key}: {getattr(self, name)} instead of {getattr(wanted, name)}")
        if self.decode != wanted.decode:
            words.append(f"images decoded {self.decode} instead of {wanted.decode} (by data.decode, or data.cache=ram)")
        if self.data != wanted.data:
            words.append(f"another training set ({self.data[:12]} instead of {wanted.data[:12]}), or one packed anew")
        return words


def _of_classes(mine: Sequence[str], theirs: Sequence[str]) -> str:
    if len(mine) != len(theirs):
        return f"{len(mine)} classes instead of {len(theirs)}"
    label = next(number for number, names in enumerate(zip(mine, theirs, strict=True)) if names[0] != names[1])
    order = ", the same in another order" if sorted(mine) == sorted(theirs) else ""
    return f"other classes (number {label} is {mine[label]} instead of {theirs[label]}{order})"


def _decode(recipe: Any, data: Manifest) -> str:
    """`smaller` where an image may be decoded at a fraction of its size, whatever else the recipe says."""
    boxed = isinstance(AUGMENTATIONS.get(recipe.augment.name)(recipe.augment), Boxed)
    if recipe.data.decode == "whole" or recipe.data.cache == "ram" or not boxed:
        return "whole"
    least = 2 * round(recipe.augment.size)
    with closing(ShardReader(data)) as reader:
        for shard in range(len(data.shards)):
            sides = np.minimum(reader.column(shard, "height"), reader.column(shard, "width"))
            if ((sides >= least) | (sides == 0)).any():  # 0: the index does not know
                return "smaller"
    return "whole"


def precision_of(recipe: Any) -> str:
    """In which a teacher answers."""
    return "bf16" if recipe.engine.precision == "bf16" else "fp32"


# What an answer looks like ----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The row of a view: the `top` most likely of `classes`, most likely first, the mass of the rest, and `shift`, the
    logits' logsumexp, with which log-probabilities become the teacher's own logits again.

    Log-probabilities take 16 bits each, in even steps down to the answer's lowest one (`low`): half floats are four
    times coarser where it matters at high temperatures, at log-probabilities around -10, where their steps are 2^-7.
    Means of a batch's losses agree to 1e-4; single ones to about 3e-3 for very sharp answers at T = 4, else to 1e-3.
    With all classes there are no numbers of classes, and no rest.
    """

    classes: int
    top: int

    @property
    def kind(self) -> np.dtype:
        logs: list[Any] = [("logs", "<u2", (self.top,)), ("low", "<f4"), ("shift", "<f4")]
        if self.top == self.classes:
            return np.dtype(logs)
        number = np.min_scalar_type(self.classes - 1).newbyteorder("<")
        return np.dtype([("classes", number, (self.top,)), *logs, ("rest", "<f4")])

    def pack(self, logits: Tensor) -> np.ndarray:
        """Rows [N] of `kind`, for logits [N, K]."""
        shift = logits.double().logsumexp(1)
        logs = logits.double() - shift[:, None]
        rows = np.zeros(len(logs), self.kind)
        rows["shift"] = shift.cpu().numpy()
        if self.top < self.classes:
            logs, order = logs.sort(stable=True, dim=1, descending=True)
            rows["classes"] = order[:, : self.top].cpu().numpy()
            rows["rest"] = logs[:, self.top :].logsumexp(1).cpu().numpy()
            logs = logs[:, : self.top]
        low = logs.amin(1).float()
        steps = logs / low.double().clamp(max=-1e-30)[:, None] * STEPS
        rows["low"], rows["logs"] = low.cpu().numpy(), steps.round().clamp(0, STEPS).cpu().numpy()
        return rows

    @property
    def blank(self) -> dict[str, np.ndarray]:
        """A row, by name, that says nothing: every class is as likely."""
        row = self.pack(torch.zeros(1, self.classes))[0]
        return {name: row[name] for name in self.kind.names or ()}


def restore(extra: Mapping[str, Tensor], classes: int) -> Tensor:
    """The teacher's logits fp32 [B, K] of the views' rows; absent classes share the mass of the rest evenly."""
    shift = extra["shift"].float()
    logits = extra["logs"].float() * (extra["low"].float() / STEPS)[:, None] + shift[:, None]
    if "classes" not in extra:
        return logits
    even = extra["rest"].float() - np.log(classes - logits.shape[1]) + shift
    return even[:, None].repeat(1, classes).scatter(1, extra["classes"], logits)


# The folder ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """A folder of answers: `cache.json` says what made them, the rest is a sidecar set."""

    folder: Path
    identity: Identity
    top: int
    about: Mapping[str, Any]  # the teacher's name and precision, and how many images it saw at once

    @classmethod
    def open(cls, folder: str | Path, expected: Identity) -> "Cache":
        """A finished cache.

        Raises:
            InputError: it is none, is damaged, or holds the answers to other questions; all differences are listed.
        """
        folder = Path(folder).expanduser()
        found = cls.read(folder)
        if found is None:
            raise InputError(f"{folder} is no cache of a teacher's answers; {MAKE.format(folder)}")
        found.refuse_other(expected, "make another, or train with what this one was made for")
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} is an unfinished cache; run the command that made it again, it goes on")
        return found

    @classmethod
    def read(cls, folder: Path) -> "Cache | None":
        """A cache, finished or not; None where there is none."""
        path = folder / CACHE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, sha256 = content["version"], content.pop("sha256")
            if version != VERSION:
                raise InputError(f"{path} has version {version}; this Penstock reads version {VERSION}")
            if sha256 != _sum(content):
                raise InputError(f"{path} was changed after it was written; delete the folder and make the cache anew")
            return cls(folder, Identity.load(content["identity"]), content["top"], content["about"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read ({type(error).__name__}: {error}); delete the folder and make the cache anew"
            ) from None

    def save(self) -> None:
        """Write `cache.json` atomically."""
        content = self._content()
        with replacing(self.folder / CACHE) as file:
            file.write((json.dumps(content | {"sha256": _sum(content)}, indent=1, ensure_ascii=False) + "\n").encode())

    def refuse_other(self, expected: Identity, remedy: str) -> None:
        """Raise InputError, with every difference, where these are not the answers that are wanted."""
        words = self.identity.differences(expected)
        if words:
            raise InputError(
                f"the cached answers in {self.folder} are not those of this recipe: {'; '.join(words)}; {remedy}"
            )

    def check_use(self, recipe: Any, raw_logits: Sequence[str]) -> None:
        """Whether a student of `recipe` may learn from these answers; warns where they are of another precision.

        Args:
            raw_logits: names of the losses that need the logits of all classes.

        Raises:
            InputError: one of them is on, and classes were left out.
        """
        count = len(self.identity.classes)
        if raw_logits and self.top < count:
            raise InputError(
                f"task.losses.{raw_logits[0]}: it needs the logits of all classes, however unlikely, and {self.folder} "
                f"holds those of the {self.top} likeliest of {count}; make a cache with --top {count}, or set "
                f"task.cache=null, so that the teacher runs, or task.losses.{raw_logits[0]}=null"
            )
        mine, its = self.about.get("precision"), precision_of(recipe)
        if mine != its and distributed.is_main():
            log.warning(
                "the teacher answered in %s into %s, and with engine.precision=%s would answer in %s: its answers "
                "differ a little; make a cache with this precision where that matters",
                mine, self.folder, recipe.engine.precision, its,
            )  # fmt: skip

    @property
    def layout(self) -> Layout:
        return Layout(len(self.identity.classes), self.top)

    @property
    def sum(self) -> str:
        """SHA-256 of all that is said in `cache.json`."""
        return _sum(self._content())

    def sidecar(self, data: Manifest) -> PackedSidecar:
        """What hands the answers over with the views of `data`.

        Raises:
            InputError: files are missing or cut, or belong to another cache.
        """
        manifest = Manifest.load(self.folder)
        if manifest.pack.get("cache") != self.sum:
            raise InputError(f"{self.folder}: {MANIFEST} and {CACHE} are of two caches; copy or make the folder again")
        layout = self.layout
        return PackedSidecar(manifest, data, layout.kind, self.identity.pool, layout.blank)

    def _content(self) -> dict[str, Any]:
        plain = json.loads(json.dumps(asdict(self.identity)))
        return {"version": VERSION, "identity": plain, "top": self.top, "about": dict(self.about)}


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
