"""What an ablation has found so far: effects with intervals, as a table and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from launch.ablate.plan import ADD_ONE, KINDS, LEAVE_ONE_OUT, Contrast, Plan
from launch.series import PREDICTIONS, Trial, finished
from penstock.errors import InputError
from penstock.paired import METRICS, Comparison, Effect, Predictions
from penstock.tracking.journal import Run, read_run

UNITS = {"top1": "top-1, %", "ece": "calibration error, %", "nll": "NLL, nats"}


@dataclass
class Finding:
    """What a part does in one kind of comparison, over the seeds that both runs have finished with."""

    contrast: Contrast
    seeds: list[int]
    effects: dict[str, Effect]  # by metric, with the part minus without
    flips: tuple[int, int]  # images right only with the part, and only without it, over all seeds
    time_per_image: float | None  # per cent more with the part, from the median images/s
    wall_time: float | None  # per cent more with the part, from the whole runs


@dataclass
class Report:
    name: str
    plan: Plan
    metric: str
    findings: list[Finding] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)  # each finished run's own figures
    images: int = 0

    def find(self, part: str, kind: str) -> Finding | None:
        found = (each for each in self.findings if (each.contrast.part, each.contrast.kind) == (part, kind))
        return next(found, None)

    def parts(self) -> list[str]:
        """By effect, the largest first; those without a finding last."""

        def effect(part: str) -> float:
            found = self.find(part, LEAVE_ONE_OUT) or self.find(part, ADD_ONE)
            return found.effects[self.metric].value if found else -math.inf

        return sorted(self.plan.parts, key=effect, reverse=True)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if any(each.kind == kind for each in self.plan.contrasts)]


def report(folder: Path, metric: str = "top1", resamples: int = 2000) -> Report:
    """Read what is there. Raises InputError where runs were not measured on the same images."""
    plan = Plan.load(folder)
    made = Report(folder.name, plan, metric)
    done = {trial: folder / trial.name for trial in plan.trials() if finished(folder / trial.name)}
    if not done:
        return made
    journals = {trial: read_run(path) for trial, path in done.items()}
    same_data(journals)
    predictions = ((trial.name, Predictions.load(path / PREDICTIONS)) for trial, path in done.items())
    comparison = Comparison(predictions, resamples)
    made.images = comparison.images
    for trial in done:
        figures = {name: comparison.value(trial.name, name) for name in METRICS}
        run = journals[trial]
        cost = {"seconds": run.seconds, "images_per_second": speed(run)}
        made.runs.append(
            {"run": trial.name, "off": plan.variants[trial.variant], "seed": trial.seed, **figures, **cost}
        )
    for contrast in plan.contrasts:
        both = [s for s in plan.seeds if Trial(contrast.on, s) in done and Trial(contrast.off, s) in done]
        if both:
            made.findings.append(_finding(contrast, both, comparison, journals))
    return made


def _finding(contrast: Contrast, seeds: list[int], comparison: Comparison, journals: dict[Trial, Run]) -> Finding:
    trials = [(Trial(contrast.on, seed), Trial(contrast.off, seed)) for seed in seeds]
    pairs = [(on.name, off.name) for on, off in trials]
    speeds = [(speed(journals[off]), speed(journals[on])) for on, off in trials]  # time is one over speed
    seconds = [(journals[on].seconds, journals[off].seconds) for on, off in trials]
    return Finding(
        contrast,
        seeds,
        {metric: comparison.effect(pairs, metric) for metric in METRICS},
        comparison.flips(pairs),
        _more(speeds),
        _more(seconds),
    )


def _more(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """By how many per cent the first exceeds the second, the median over pairs."""
    found = [100 * (a / b - 1) for a, b in pairs if a and b]
    return median(found) if found else None


def speed(run: Run) -> float | None:
    """Median images/s of training."""
    values = [value for _, value in run.series.get("perf/images_per_second", ()) if math.isfinite(value) and value > 0]
    return median(values) if values else None


def same_data(journals: dict[Trial, Run]) -> None:
    first, *others = journals.items()
    key = "data.validation.digest"
    for trial, run in others:
        if run.tags.get(key) != first[1].tags.get(key):
            raise InputError(
                f"{first[0].name} and {trial.name} were measured on different validation sets "
                f"({first[1].tags.get(key)} and {run.tags.get(key)}), so their difference says nothing"
            )


# Showing ---------------------------------------------------------------------------------------


def table(made: Report) -> Table:
    grid = Table(title=heading(made), title_justify="left", caption=footing(made), caption_justify="left")
    grid.add_column("part")
    for kind in made.kinds:
        grid.add_column(f"{UNITS[made.metric]}\n{kind}", justify="right")
    second = "ece" if made.metric != "ece" else "nll"
    kind = made.kinds[0]
    grid.add_column(f"{UNITS[second]}\n{kind}", justify="right")
    grid.add_column("time\nper image (in all)", justify="right")
    for part in made.parts():
        found = [made.find(part, each) for each in made.kinds]
        cells = [shown(each.effects[made.metric]) if each else "-" for each in found]
        first = found[0]
        cells.append(shown(first.effects[second]) if first else "-")
        cells.append(f"{percent(first.time_per_image)} ({percent(first.wall_time)})" if first else "-")
        grid.add_row(part, *cells)
    return grid


def heading(made: Report) -> str:
    def ends(variant: str) -> str:
        values = [run[made.metric] for run in made.runs if run["run"].rpartition("-seed")[0] == variant]
        return f"{variant} {sum(values) / len(values):.2f}" if values else ""

    total = len(made.plan.trials())
    there = ", ".join(filter(None, (ends("full"), ends("none"))))
    runs = f"{len(made.runs)} of {total} runs" if len(made.runs) < total else f"{total} runs"
    return f"{made.name}: {runs}, {made.images:,} images" + (f"; {UNITS[made.metric]}: {there}" if there else "")


def footing(made: Report) -> str:
    seeds = sorted({len(each.seeds) for each in made.findings})
    over = f"{'-'.join(map(str, seeds))} seed{'s' * (seeds != [1])}" if seeds else "no seed yet"
    words = f"With the part minus without it, 95 % interval over images and {over}; * excludes 0."
    if seeds and seeds[0] == 1:
        words += " One seed: its interval is over images alone."
    return words + " Each interval misses in 1 case of 20, so of many parts some are marked by luck."


def shown(effect: Effect) -> str:
    return f"{effect.value:+.2f} \\[{effect.low:+.2f}, {effect.high:+.2f}]{' *' if effect.sure else '  '}"


def percent(value: float | None) -> str:
    return "?" if value is None else f"{value:+.0f} %"


def as_json(made: Report) -> dict[str, Any]:
    """The same for programs; effects are with the part minus without it."""
    findings = [
        {
            **asdict(each.contrast),
            "seeds": each.seeds,
            "effects": {name: {**asdict(e), "excludes_0": e.sure} for name, e in each.effects.items()},
            "right_only_with": each.flips[0],
            "right_only_without": each.flips[1],
            "time_per_image_percent": each.time_per_image,
            "wall_time_percent": each.wall_time,
        }
        for each in made.findings
    ]
    plan = asdict(made.plan)
    return {"name": made.name, "images": made.images, "units": UNITS, **plan, "contrasts": findings, "runs": made.runs}
