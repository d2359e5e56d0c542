"""An ablation as a picture: a row per part, its effect as a dot with its interval."""

from pathlib import Path

from launch.ablate.plan import ADD_ONE, LEAVE_ONE_OUT
from launch.ablate.report import UNITS, Report, heading

STYLE = {LEAVE_ONE_OUT: (-0.14, "C0"), ADD_ONE: (0.14, "white")}  # place in the row, face of the dot


def draw(made: Report, path: Path) -> None:
    """Raises ValueError where nothing was found yet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not made.findings:
        raise ValueError("there is no effect to draw yet")
    parts = made.parts()
    metrics = [made.metric, "ece" if made.metric != "ece" else "nll"]
    figure = Figure(figsize=(9.6, 1.9 + 0.42 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric in zip(panels, metrics, strict=True):
        for kind in made.kinds:
            shift, face = STYLE[kind]
            found = [(row, made.find(part, kind)) for row, part in enumerate(parts)]
            there = [(row + shift, each.effects[metric]) for row, each in found if each]
            values = [effect.value for _, effect in there]
            errors = [[e.value - e.low for _, e in there], [e.high - e.value for _, e in there]]
            places = [row for row, _ in there]
            dots = {"fmt": "o", "ms": 5.5, "mfc": face, "mec": "C0", "ecolor": "C0", "elinewidth": 1.3, "capsize": 2.5}
            panel.errorbar(values, places, xerr=errors, label=kind, **dots)
        panel.axvline(0, color="0.4", lw=0.9, zorder=0)
        panel.set_xlabel(f"effect on {UNITS[metric]} ({'right' if metric == 'top1' else 'left'} is better)")
        panel.grid(axis="x", alpha=0.25)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(parts)), parts)
    panels[0].set_ylim(len(parts) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    about = "With the part minus without it, and its 95 % interval"
    figure.suptitle(f"{heading(made)}\n{about}", fontsize=10, x=0.01, ha="left")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
