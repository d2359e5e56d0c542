"""What a comparison of teacher and students found."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from penstock.cost import Cost
from penstock.paired import Effect

FIGURES = {  # what is measured of every run, and its unit
    "top1": "%",
    "nll": "nats",
    "nll_scaled": "nats, logits divided by the export's temperature",
    "ece": "%, calibration error in 15 bins",
    "ece_scaled": "%, logits divided by the export's temperature",
    "temperature": "of the export",
    "agreement": "% of the images with the teacher's answer",
    "kl": "nats, mean KL(teacher || student)",
}


@dataclass(frozen=True)
class Row:
    """One network: its figures over the runs that trained it, and its cost, which all of these share."""

    name: str
    role: str  # teacher, alone, distilled or unknown
    how: str  # the losses it was distilled with
    places: list[str]
    seeds: list[int | None]
    runs: list[dict[str, float]]  # the figures of each run, by `FIGURES`; agreement and kl are students' alone
    cost: Cost

    def mean(self, figure: str) -> float | None:
        values = [run[figure] for run in self.runs if figure in run]
        return fmean(values) if values else None

    def spread(self, figure: str) -> float | None:
        """Standard deviation over the runs; None where there is one alone."""
        values = [run[figure] for run in self.runs if figure in run]
        return stdev(values) if len(values) > 1 else None

    def error(self, images: int) -> float:
        """Of top-1, in per cent: its spread over runs, or for one run its standard error over images."""
        over_runs, share = self.spread("top1"), self.runs[0]["top1"] / 100
        return over_runs if over_runs is not None else 100 * math.sqrt(share * (1 - share) / images)


@dataclass(frozen=True)
class Gain:
    """A student distilled minus the same student alone."""

    distilled: str
    alone: str
    effects: dict[str, Effect]  # top1, ece, nll
    flips: tuple[int, int]  # images right only when distilled, and only when alone, over all pairs of runs


@dataclass(frozen=True)
class Report:
    """All of it. Rows are in the order given, the teacher apart."""

    teacher: Row
    students: list[Row]
    gains: list[Gain]
    data: dict[str, Any]  # folder, identity, images measured, images left out
    machine: dict[str, str]
    rounds: int  # of the latency
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [self.teacher, *self.students]

    @property
    def images(self) -> int:
        return int(self.data["images"])


def times_smaller(row: Row, teacher: Row) -> dict[str, float]:
    """How many times less of everything a network costs than its teacher: below 1 it costs more."""
    own, its = sizes(row.cost), sizes(teacher.cost)
    found = {name: its[name] / value for name, value in own.items() if value and name in its}
    times = {batch: teacher.cost.latency[batch].over(time) for batch, time in row.cost.latency.items()}
    return found | {f"latency_ms_{batch}": value for batch, value in times.items()}


def sizes(cost: Cost) -> dict[str, int]:
    """Parameters, MACs of an image, and bytes of the file where there is one."""
    found = {"parameters": cost.parameters, "macs": cost.macs}
    return found if cost.bytes is None else found | {"bytes": cost.bytes}


def as_json(report: Report) -> dict[str, Any]:
    """The same for programs."""
    return {
        "data": report.data,
        "machine": report.machine,
        "latency_rounds": report.rounds,
        "units": FIGURES,
        "teacher": _row(report.teacher, report),
        "students": [_row(row, report) for row in report.students],
        "gains": [
            {
                "distilled": gain.distilled,
                "alone": gain.alone,
                "effects": {name: {**asdict(e), "excludes_0": e.sure} for name, e in gain.effects.items()},
                "right_only_distilled": gain.flips[0],
                "right_only_alone": gain.flips[1],
            }
            for gain in report.gains
        ],
        "warnings": report.warnings,
    }


def _row(row: Row, report: Report) -> dict[str, Any]:
    own = ("name", "role", "how", "places", "seeds", "runs")
    means: Mapping[str, float | None] = {name: row.mean(name) for name in FIGURES}
    spreads = {f"{name}_sd": row.spread(name) for name in FIGURES}
    cost = {
        **sizes(row.cost),
        "image": list(row.cost.image),
        "latency_ms": {str(batch): each._asdict() for batch, each in row.cost.latency.items()},
    }
    return {
        **{name: getattr(row, name) for name in own},
        "figures": {name: value for name, value in {**means, **spreads}.items() if value is not None},
        "top1_error": row.error(report.images),
        "cost": cost,
        "times_smaller_than_teacher": times_smaller(row, report.teacher),
    }
