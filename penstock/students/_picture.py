"""Accuracy against cost, as a picture: a panel per cost, a colour per student, an arrow from alone to distilled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.cost import BATCHES
from penstock.students._networks import ALONE, DISTILLED, TEACHER, UNKNOWN
from penstock.students._report import Report, Row

MARKS = {TEACHER: "*", ALONE: "o", DISTILLED: "o", UNKNOWN: "s"}  # alone is hollow
WIDTH, DPI = 12.5, 130  # inches, dots per inch
LINE, LETTER = 0.19, 0.085  # inches that a name takes, and each of its letters
LONG = 34  # letters of a name


def draw(report: Report, path: Path) -> None:
    """Write a PNG. Names stand at the right, at the height of their accuracy, which all panels share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = max(4.4, 1.6 + LINE * len(report.rows))
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    longest = max(len(_label(row)) for row in report.rows)
    edges = {
        "left": 0.06,
        "right": 0.96 - LETTER * longest / WIDTH,
        "bottom": 0.75 / height,
        "top": 1 - 0.85 / height,
        "wspace": 0.08,
    }
    panels = figure.subplots(1, 3, sharey=True, gridspec_kw=edges)
    colours = _colours(report)
    low, high = _limits([(row.mean("top1") or 0.0, row.error(report.images)) for row in report.rows])
    panels[0].set_ylim(low, high)
    for panel, (label, values) in zip(panels, _costs(report).items(), strict=True):
        _panel(panel, label, values, report, colours)
    panels[0].set_ylabel("top-1, %")
    _names(panels[-1], report, colours)
    figure.suptitle(
        f"Accuracy against cost: {report.teacher.name} and its students, {report.images:,} images\n"
        "bars: standard deviation over runs, or standard error over images; times: median and quartiles",
        fontsize=10, x=0.01, ha="left", y=1 - 0.12 / height, va="top",
    )  # fmt: skip
    _legend(figure, {row.role for row in report.rows})
    canvas.print_png(str(path))


def _costs(report: Report) -> dict[str, list[tuple[float, float, float]]]:
    """By axis: a cost of each row with the lengths of its bar to the left and right."""
    batch = min(BATCHES)
    found: dict[str, list[tuple[float, float, float]]] = {
        "parameters": [(row.cost.parameters, 0, 0) for row in report.rows],
        "MACs per image": [(row.cost.macs, 0, 0) for row in report.rows],
    }
    times = [row.cost.latency[batch] for row in report.rows]
    found[f"ms per image, batch {batch}"] = [(t.median, t.median - t.low, t.high - t.median) for t in times]
    return found


def _panel(panel: Any, label: str, values: Sequence[tuple[float, float, float]], report: Report, colours: dict) -> None:
    panel.set_xscale("log")
    places = {}
    for row, (cost, left, right) in zip(report.rows, values, strict=True):
        top1 = row.mean("top1") or 0.0
        places[row.name] = (cost, top1)
        colour = colours[row.name]
        panel.errorbar(
            cost, top1, xerr=[[left], [right]], yerr=row.error(report.images), fmt=MARKS[row.role], color=colour,
            ms=14 if row.role == TEACHER else 8, mfc="white" if row.role == ALONE else colour, mec=colour, mew=1.5,
            elinewidth=1, zorder=3,
        )  # fmt: skip
    panel.axhline(places[report.teacher.name][1], color=colours[report.teacher.name], lw=0.8, ls=":", zorder=1)
    for gain in report.gains:
        arrow = {"arrowstyle": "-|>", "color": colours[gain.distilled], "lw": 1.4, "shrinkA": 5, "shrinkB": 5}
        panel.annotate("", xy=places[gain.distilled], xytext=places[gain.alone], arrowprops=arrow, zorder=2)
    panel.set_xlabel(label)
    panel.grid(alpha=0.25, which="major")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    _ticks(panel, [end for cost, left, right in values for end in (cost - left, cost + right)])


def _ticks(panel: Any, values: Sequence[float]) -> None:
    """At most six ticks at 1, 2 or 5 times a power of ten, written with a unit's prefix."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    low, high = min(values), max(values)
    margin = max((high / low) ** 0.12, 1.35)
    panel.set_xlim(low / margin, high * margin)
    steps = [digit * 10.0**power for power in range(-6, 16) for digit in (1, 2, 5)]
    shown = [step for step in steps if low / margin <= step <= high * margin]
    if len(shown) > 6:
        shown = [step for step in shown if f"{step:e}"[0] == "1"]
    shown = shown[:: -(-len(shown) // 6)] if shown else [low]
    panel.xaxis.set_major_locator(FixedLocator(shown))
    panel.xaxis.set_minor_locator(NullLocator())
    below_one = low / margin < 1  # parts of a millisecond are not micro-milliseconds
    panel.xaxis.set_major_formatter("{x:g}" if below_one else EngFormatter(sep=""))


def _limits(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    low, high = min(v - e for v, e in values), max(v + e for v, e in values)
    margin = max(0.08 * (high - low), 0.2)
    return low - margin, high + margin


def _names(panel: Any, report: Report, colours: dict[str, Any]) -> None:
    """Names at the right edge, moved apart where they would overlap, each with a line to its height."""
    low, high = panel.get_ylim()
    inches = panel.get_position().height * panel.figure.get_figheight()
    step = LINE / inches  # as a share of the panel's height
    rows = sorted(report.rows, key=lambda row: row.mean("top1") or 0.0)
    wanted = [((row.mean("top1") or 0.0) - low) / (high - low) for row in rows]
    for row, at, place in zip(rows, wanted, spread(wanted, step), strict=True):
        colour = colours[row.name]
        line = {"color": colour, "lw": 0.7, "clip_on": False, "transform": panel.transAxes}
        panel.plot([1.0, 1.06], [at, place], **line)
        weight = "bold" if row.role == TEACHER else "normal"
        panel.text(
            1.07, place, _label(row), transform=panel.transAxes, color=colour,
            va="center", fontsize=9, weight=weight,
        )  # fmt: skip


def spread(wanted: Sequence[float], step: float) -> list[float]:
    """Increasing places at least `step` apart, as near to the wanted ones as may be, in [0, 1] where they fit."""
    blocks: list[list[float]] = []  # sum of (wanted - own offset), number of members
    for place in wanted:
        blocks.append([place, 1])
        while len(blocks) > 1 and _middle(blocks[-2]) + step * blocks[-2][1] > _middle(blocks[-1]):
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total - step * blocks[-1][1] * count, blocks[-1][1] + count]
    found = [_middle(block) + step * number for block in blocks for number in range(int(block[1]))]
    for number in range(len(found)):  # pushed in from below, then from above
        found[number] = max(found[number], step * number)
    for number in range(len(found)):
        found[-1 - number] = min(found[-1 - number], 1 - step * number)
    return found


def _middle(block: Sequence[float]) -> float:
    """Where the first of a block of names is placed."""
    return block[0] / block[1]


def _colours(report: Report) -> dict[str, Any]:
    """A colour per student, which its distilled and its alone form share; the teacher is black."""
    partner = {gain.distilled: gain.alone for gain in report.gains}
    found: dict[str, Any] = {report.teacher.name: "black"}
    students = list(dict.fromkeys(partner.get(row.name, row.name) for row in report.students))
    for number, name in enumerate(students):
        found[name] = f"C{number}"
    return found | {name: found[alone] for name, alone in partner.items()}


def _legend(figure: Any, roles: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], ls="", marker=MARKS[role], color="black", ms=11 if role == TEACHER else 7,
            mfc="white" if role == ALONE else "black", label=role,
        )
        for role in MARKS if role in roles
    ]  # fmt: skip
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, bbox_to_anchor=(0.99, 0.995))


def _label(row: Row) -> str:
    name = row.name if len(row.name) <= LONG else f"{row.name[: LONG - 3]}..."
    return f"{name}  {row.mean('top1'):.2f}"
