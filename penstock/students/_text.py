"""The comparison as a table, in the terminal and in Markdown."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from penstock.paired import Effect
from penstock.students._networks import UNKNOWN
from penstock.students._report import Gain, Report, Row, times_smaller

WIDTH = 120  # columns
METRICS = {"top1": "top-1, points", "nll": "NLL, nats", "ece": "ECE, points"}
Cell = tuple[str, str]  # a figure, and what is said of it beneath


def headings(report: Report) -> list[str]:
    fixed = ["network", "top-1, %", "NLL", "ECE, %\n(scaled)", "agreement\n%", "KL", "params", "MACs"]
    return [*fixed, *(f"ms at\nbatch {batch}" for batch in report.teacher.cost.latency), "file"]


def cells(row: Row, report: Report) -> list[Cell]:
    """A row's cells."""
    costs: list[Cell] = []
    smaller = times_smaller(row, report.teacher) if row is not report.teacher else {}
    shown = {
        "parameters": quantity(row.cost.parameters),
        "macs": quantity(row.cost.macs),
        **{f"latency_ms_{batch}": f"{each.median:.3g}" for batch, each in row.cost.latency.items()},
        "bytes": "" if row.cost.bytes is None else f"{quantity(row.cost.bytes)}B",
    }
    for name, text in shown.items():
        costs.append((text, f"÷ {smaller[name]:.3g}" if name in smaller else ""))
    trained = "" if row.role in (UNKNOWN, row.name) else f"{row.role}{': ' * bool(row.how)}{row.how}"
    count = f"{len(row.runs)} runs" if len(row.runs) > 1 else ""
    return [
        (row.name, ", ".join(filter(None, (trained, count)))),
        (f"{row.mean('top1'):.2f}", f"± {row.error(report.images):.2f}"),
        (_number(row.mean("nll"), ".3f"), ""),
        (_number(row.mean("ece"), ".2f"), f"({_number(row.mean('ece_scaled'), '.2f')})"),
        (_number(row.mean("agreement"), ".2f"), ""),
        (_number(row.mean("kl"), ".3f"), ""),
        *costs,
    ]


def table(report: Report) -> Table:
    """At most `WIDTH` columns wide."""
    grid = Table(title=title(report), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings(report)):
        first = number == 0
        grid.add_column(heading, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in report.rows:
        grid.add_row(*(Text.assemble(above, "\n", (beneath, "dim")) for above, beneath in cells(row, report)))
    return grid


def gains(report: Report) -> Table:
    """What distillation gives, where the same student was trained alone."""
    heading = "Distilled minus alone, 95 % intervals; * excludes 0"
    grid = Table(title=heading, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, text in enumerate(gain_headings()):
        grid.add_column(text, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for gain in report.gains:
        _, *effects = gain_cells(gain)
        grid.add_row(Text.assemble(gain.distilled, "\n", (f"- {gain.alone}", "dim")), *map(Text, effects))
    return grid


def gain_headings() -> list[str]:
    return ["network", *METRICS.values(), "right only distilled,\nonly alone"]


def gain_cells(gain: Gain) -> list[str]:
    effects = [shown(gain.effects[metric], 3 if metric == "nll" else 2) for metric in METRICS]
    return [f"{gain.distilled} - {gain.alone}", *effects, f"{gain.flips[0]:,}, {gain.flips[1]:,}"]


def print_report(report: Report, console: Console | None = None) -> None:
    """Everything there is to say, plain where there is no terminal."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(table(report))
    if report.gains:
        console.print()
        console.print(gains(report))
    console.print()
    for note in notes(report):
        console.print(Text(note, "dim"))
    for warning in report.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))


def markdown(report: Report) -> str:
    """The same as a document."""
    heads = [heading.replace("\n", " ") for heading in headings(report)]
    lines = [f"# {title(report)}", "", *_grid(heads, [[_one(c) for c in cells(row, report)] for row in report.rows])]
    if report.gains:
        lines += ["", "Distilled minus alone, 95 % intervals; * excludes 0", ""]
        lines += _grid(
            [heading.replace("\n", " ") for heading in gain_headings()], [gain_cells(gain) for gain in report.gains]
        )
    lines += ["", *(f"{note}\n" for note in notes(report)), *(f"Warning: {text}\n" for text in report.warnings)]
    return "\n".join(lines).replace("*", "\\*")


def title(report: Report) -> str:
    return f"{report.teacher.name} and its students on {report.data['set']}, {report.images:,} images"


def notes(report: Report) -> list[str]:
    """What the figures mean, and what they were measured on."""
    spoken = ("threads", "load")
    machine = ", ".join(f"{name} {text}" if name in spoken else text for name, text in report.machine.items())
    found = [
        "±: standard deviation over runs, or for one run the standard error over images. ECE: calibration error in 15 "
        "bins, in brackets at the export's temperature (fitted to half of its own validation set). Agreement and "
        "KL(teacher || student): with the teacher's answers. ÷: times less than the teacher.",
        f"Latency in fp32, median over {report.rounds} interleaved rounds, one measurement for networks of one shape; "
        f"{machine}.",
    ]
    if any(effect.seeds == 1 for gain in report.gains for effect in gain.effects.values()):
        found.insert(1, "One pair of runs: the interval is over images alone, and says nothing of other seeds.")
    return found


def shown(effect: Effect, digits: int) -> str:
    value, low, high = (f"{number:+.{digits}f}" for number in (effect.value, effect.low, effect.high))
    return f"{value} [{low}, {high}]{' *' if effect.sure else '  '}"


def quantity(value: float) -> str:
    """Three digits and a unit: 5.72 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _one(cell: Cell) -> str:
    above, beneath = cell
    in_brackets = f"({beneath})" if beneath[:1].isalpha() else beneath
    return f"{above} {in_brackets}".strip()


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *("---:" for _ in heads[1:])]
    return ["| " + " | ".join(line) + " |" for line in (heads, ruler, *rows)]
