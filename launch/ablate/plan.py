"""Which runs an ablation needs, and which of them are compared."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.ablate.parts import Part
from launch.series import Trial, beneath
from penstock.errors import InputError

LEAVE_ONE_OUT, ADD_ONE = "leave-one-out", "add-one"
KINDS = (LEAVE_ONE_OUT, ADD_ONE)
FILE = "plan.json"


@dataclass(frozen=True)
class Contrast:
    """The effect of a part: a variant with it minus one without it that is otherwise alike."""

    part: str
    kind: str
    on: str
    off: str


@dataclass
class Plan:
    """An ablation. Kept as plan.json in its folder, from which a report is made."""

    recipe: str
    overrides: list[str]
    seeds: list[int]
    parts: dict[str, dict[str, str]]
    variants: dict[str, list[str]] = field(default_factory=dict)  # name: parts that are off
    contrasts: list[Contrast] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: str, overrides: Sequence[str], parts: Sequence[Part], seeds: Sequence[int], kinds=KINDS):
        """Variants that have the same parts off are one: with two parts, only-a is without-b."""
        plan = cls(recipe, list(overrides), list(seeds), {part.name: dict(part.off) for part in parts})
        names = list(plan.parts)

        def variant(name: str, off: list[str]) -> str:
            for known, same in plan.variants.items():
                if same == off:
                    return known
            plan.variants[name] = off
            return name

        if LEAVE_ONE_OUT in kinds:
            full = variant("full", [])
            for part in names:
                plan.contrasts.append(Contrast(part, LEAVE_ONE_OUT, full, variant(f"without-{part}", [part])))
        if ADD_ONE in kinds:
            none = variant("none", names)
            for part in names:
                only = variant(f"only-{part}", [name for name in names if name != part])
                plan.contrasts.append(Contrast(part, ADD_ONE, only, none))
        return plan

    def trials(self) -> list[Trial]:
        """In the order in which they run: every variant with one seed before the next seed."""
        return [Trial(variant, seed) for seed in self.seeds for variant in self.variants]

    def overrides_of(self, variant: str) -> list[str]:
        return self.values(self.variants[variant])

    def values(self, off: Sequence[str]) -> list[str]:
        """Overrides of the recipe with these parts off; they win over what the command line says of the same keys."""
        without = {key: value for part in off for key, value in self.parts[part].items()}
        kept = [given for given in self.overrides if not beneath(given.partition("=")[0].strip(), without)]
        return [*kept, *(f"{key}={value}" for key, value in without.items())]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{FILE}"
        fresh.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        fresh.replace(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        if not (folder / FILE).is_file():
            raise InputError(f"{folder} holds no ablation yet; leave out --report to run it")
        values: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(**{**values, "contrasts": [Contrast(**each) for each in values["contrasts"]]})
