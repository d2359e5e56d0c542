"""Runs side by side: what they reached, and what differs between their recipes.

A run is its folder (no MLflow needed), or the id or name of a run in an MLflow store.
"""

import json
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from penstock.errors import InputError
from penstock.tracking.journal import Run, read_run

RESULTS = ("final/*", "best/*")
WHERE_NO_RESULTS = ("eval/*", "train/loss")  # a run that goes on has no final figure yet
CURVES = ("train/loss", "eval/*", "health/std", "health/effective_rank")
AXIS = "progress/samples"


def load(names: Sequence[str], uri: str) -> list[Run]:
    """The runs, each with a name of its own. Raises InputError for one that is nowhere, or not unique."""
    runs = [read_run(Path(name)) if Path(name).is_dir() else from_mlflow(name, uri) for name in names]
    labels = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if labels.count(run.name) > 1:
            run.name = name.rstrip("/")
    return runs


def from_mlflow(name: str, uri: str) -> Run:
    """A run by id or by name from the store at `uri`."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise InputError(f"{name!r} is no run folder, and there is no MLflow store at {uri} to look it up in")
    from penstock.tracking.mirror import open_store, use_short_timeouts

    use_short_timeouts()
    try:
        client = open_store(uri)
        if re.fullmatch("[0-9a-f]{32}", name):
            found = [client.get_run(name)]
        else:
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            quoted = name.replace("'", "\\'")
            found = client.search_runs(experiments, f"attributes.run_name = '{quoted}'", max_results=20)
    except Exception as error:
        raise InputError(f"{name!r}: no run folder, and MLflow at {uri} says: {error}") from error
    if not found:
        raise InputError(f"{name!r} is neither a run folder nor a run in {uri}")
    if len(found) > 1:
        ids = ", ".join(run.info.run_id for run in found)
        raise InputError(f"{len(found)} runs in {uri} are called {name!r}; give one of the ids {ids}")
    return as_run(client, found[0])


def as_run(client: Any, found: Any) -> Run:
    info, data = found.info, found.data
    run = Run(info.run_name, info.run_id, info.status, dict(data.params), dict(data.tags))
    for metric in data.metrics:
        history = client.get_metric_history(info.run_id, metric)
        run.series[metric] = [(p.step, p.value) for p in sorted(history, key=lambda p: (p.step, p.timestamp))]
        if not info.end_time:
            run.seconds = max(run.seconds, (max(p.timestamp for p in history) - info.start_time) / 1000)
    if info.end_time:
        run.seconds = (info.end_time - info.start_time) / 1000
    return run


def differences(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """The recipe's keys in which the runs are not all alike, with each run's value; None where it has no such key."""
    keys = sorted({key for run in runs for key in run.params})
    values = {key: [run.params.get(key) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def results(runs: Sequence[Run], patterns: Sequence[str] = ()) -> dict[str, list[float | None]]:
    """Last values of final/* and best/* and of what `patterns` name, one per run; None where it has none."""
    names = sorted({name for run in runs for name in run.series})
    chosen = [name for name in names if matches(name, (*RESULTS, *patterns))]
    if not any(matches(name, RESULTS) for name in names):
        chosen = [name for name in names if matches(name, (*WHERE_NO_RESULTS, *patterns))]
    chosen.sort(key=lambda name: (not matches(name, RESULTS), name))
    return {name: [run.last(name) for run in runs] for name in chosen}


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def facts(run: Run) -> dict[str, str]:
    """What a reader wants to know about any run, before its figures."""
    speed = [value for _, value in run.series.get("perf/images_per_second", ()) if math.isfinite(value)]
    samples, epoch = run.last(AXIS), run.last("progress/epoch")
    changed = "+" if run.tags.get("git.dirty") == "true" else ""
    return {
        "status": run.status.lower(),
        "steps": f"{run.steps:,}",
        "samples": f"{samples:,.0f}" if samples is not None else "",
        "epochs": f"{epoch:.4g}" if epoch is not None else "",
        "time": duration(run.seconds),
        "images/s": f"{sorted(speed)[len(speed) // 2]:,.0f}" if speed else "",  # the median
        "commit": run.tags.get("git.commit", "")[:10] + changed,
        "data": run.tags.get("data.training.digest", "")[:12],
    }


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def table(runs: Sequence[Run], patterns: Sequence[str] = ()) -> Table:
    grid = Table()
    grid.add_column("")
    for run in runs:
        grid.add_column(escape(run.name), justify="right", overflow="fold")
    described = [facts(run) for run in runs]
    for fact in described[0]:
        row = [each[fact] for each in described]
        if any(row):
            grid.add_row(fact, *row, style="dim")
    grid.add_section()
    for name, figures in results(runs, patterns).items():
        grid.add_row(name, *map(number, figures))
    grid.add_section()
    for key, values in differences(runs).items():
        grid.add_row(escape(key), *("-" if value is None else escape(value) for value in values))
    return grid


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def as_json(runs: Sequence[Run], patterns: Sequence[str] = ()) -> str:
    """The same as the table, for programs; numbers that are not finite are strings."""

    def plain(value: float | None) -> float | str | None:
        return value if value is None or math.isfinite(value) else str(value)

    reached, differ = results(runs, patterns), differences(runs)
    listed = [
        {
            "name": run.name,
            "source": run.source,
            "status": run.status,
            "steps": run.steps,
            "seconds": round(run.seconds, 3),
            "tags": run.tags,
            "results": {name: plain(row[index]) for name, row in reached.items() if row[index] is not None},
            "recipe": {key: row[index] for key, row in differ.items()},
        }
        for index, run in enumerate(runs)
    ]
    return json.dumps({"runs": listed, "differences": sorted(differ)}, indent=2)


def picture(runs: Sequence[Run], path: Path, patterns: Sequence[str] = ()) -> None:
    """Curves of the runs over samples seen (over steps where a run did not count them), one panel per metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    names = [n for n in sorted({n for run in runs for n in run.series}) if matches(n, patterns or CURVES)]
    names = [name for name in names if any(len(run.series.get(name, ())) > 1 for run in runs)]
    if not names:
        raise InputError("no curve to draw: no run has two values of any of " + ", ".join(patterns or CURVES))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(1 + 4.2 * columns, 0.6 + 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    over_samples = all(AXIS in run.series for run in runs)
    for index, name in enumerate(names):
        panel = figure.add_subplot(rows, columns, index + 1)
        for position, run in enumerate(runs):
            points = run.series.get(name, [])
            steps = [step for step, _ in points]
            seen = samples_at(run, steps) if over_samples else steps
            marker = "." if len(points) < 40 else ""
            panel.plot(seen, [v for _, v in points], marker=marker, lw=1.2, color=f"C{position}", label=run.name)
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.25)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if index >= len(names) - columns:
            panel.set_xlabel("samples seen" if over_samples else "steps")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    figure.savefig(path, dpi=130)


def samples_at(run: Run, steps: Sequence[int]) -> list[float]:
    """Samples seen at `steps`, on straight lines between the steps at which the run counted them."""
    import numpy as np

    counted, samples = zip(*[(0, 0.0), *run.series[AXIS]], strict=True)
    return np.interp(steps, counted, samples).tolist()
