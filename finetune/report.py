"""What a finetuning run leaves at its end: predictions, pictures, and a table that says what came out."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.confusion import confident_mistakes, confused_pairs, confusion
from penstock.backbones.batchnorm_health import BatchNormHealth
from penstock.calibration import calibrate
from penstock.classification import classification_metrics, judge, per_class_accuracy
from penstock.evaluate._features import FeatureSet
from penstock.evaluate._predictions import write_predictions
from penstock.monitor import StopEarly
from penstock.reliability import reliability, reliability_diagram
from penstock.streams.evaluation import EvalStream
from penstock.tracking import Tracker

WIDTH = 100  # columns
WORST = 5  # classes named in the table
LONG = 32  # letters of a class's name there

Rows = list[tuple[str, str]]


class Report:
    """The end of a run, on the main rank.

    Args:
        answers: logits as features, of the whole validation set.
        classes: names in label order.
        step: optimizer steps taken.
    """

    def __init__(self, folder: Path, answers: FeatureSet, classes: Sequence[str], tracker: Tracker, step: int):
        self.folder, self.answers, self.classes = folder, answers, classes
        self.tracker, self.step = tracker, step
        self.logits, self.labels = answers.features, answers.labels

    def calibration(self, seed: int) -> dict[str, float]:
        """The temperature and what it does, by `Calibrated.metrics`; empty where one sample is all there is."""
        if len(self.answers) < 2:
            return {}
        return calibrate(self.logits, self.labels, self.answers.positions, seed).metrics

    def write_files(self) -> None:
        """`predictions.npz` and `per_class.tsv`."""
        write_predictions(self.folder / "predictions.npz", self.answers)
        lines = [f"{score:.2f}\t{name}" for name, score in self._by_class()]
        table = self.folder / "per_class.tsv"
        table.write_text("top1\tclass\n" + "\n".join(lines) + "\n", encoding="utf-8")
        self.tracker.artifact(table)

    def draw_pictures(self, images: EvalStream) -> None:
        """A reliability diagram, the surest mistakes and the confused classes, for the tracker."""
        judged = judge(self.logits, self.labels)
        bins = reliability(judged.confidence, judged.correct)
        self.tracker.picture(self.step, "reliability", reliability_diagram(bins))
        sheet = confident_mistakes(self.answers, judged, self.classes, images)
        if sheet is not None:
            self.tracker.picture(self.step, "mistakes", sheet)
        self.tracker.picture(self.step, "confusion", confusion(self.logits.argmax(1), self.labels, self.classes))

    def rows(self, figures: Mapping[str, float], health: BatchNormHealth | None) -> Rows:
        """How good the classifier is.

        Args:
            figures: what `calibration` gave.
        """
        found, samples = classification_metrics(self.logits, self.labels), len(self.answers)
        share = found["top1"] / 100
        error = 100 * math.sqrt(share * (1 - share) / samples)
        rows = [("top-1", f"{found['top1']:.2f} % ± {error:.2f} (standard error; {samples:,} validation images)")]
        if self.answers.unreadable:
            rows.append(("left out", f"{self.answers.unreadable:,} validation images that cannot be read"))
        if "top5" in found:
            rows.append(("top-5", f"{found['top5']:.2f} %"))
        rows.append(("NLL", f"{found['nll']:.4f} nats"))
        rows.append(("ECE", f"{found['ece']:.2f} %{_scaled(figures)}"))
        if health is not None:
            rows.append(("batch norm", str(health).removeprefix("batch norm: ")))
        return [*rows, *self._worst()]

    def _worst(self) -> Rows:
        scores = [(name, score) for name, score in self._by_class() if score == score]
        worst = ", ".join(f"{_cut(name)} {score:.1f} %" for name, score in scores[:WORST])
        rows = [("worst classes" if len(scores) > WORST else "classes", worst)]
        if absent := len(self.classes) - len(scores):
            rows.append(("", f"{absent:,} of {len(self.classes):,} classes have no validation image"))
        pairs = confused_pairs(self.logits.argmax(1), self.labels, len(self.classes))
        if pairs:
            label, answer, share = pairs[0]
            rows.append(
                ("most confused", f"{share:.1f} % of {_cut(self.classes[label])} are taken for {self.classes[answer]}")
            )
        return rows

    def _by_class(self) -> list[tuple[str, float]]:
        """(name, top-1 in per cent) from the worst on; classes without images, with NaN, at the end."""
        scores = zip(self.classes, per_class_accuracy(self.logits, self.labels).tolist(), strict=True)
        return sorted(scores, key=lambda pair: (pair[1] != pair[1], pair[1]))


def places(folder: Path) -> Rows:
    """Where a run's results lie, and what to do with them."""
    pictures = ", ".join(sorted({path.parent.name for path in folder.glob("pictures/*/*.png")}))
    return [
        ("export", f"{folder}/export (timm opens it as local-dir:{folder}/export)"),
        ("predictions", f"{folder}/predictions.npz, per_class.tsv"),
        ("pictures", f"{folder}/pictures: {pictures}"),
        ("next", f"penstock compare {folder} ANOTHER_RUN, or look at both with penstock ui {folder.parent}"),
    ]


def stopped(early: StopEarly, folder: Path, step: int) -> Rows:
    """Which weights are where, in a run that may stop early."""
    from penstock.export import read_about

    if early.best is None:
        return []
    metric, best = early.config.metric, read_about(folder / "best")["step"]
    rows = [("best", f"{folder}/best: step {best:,}, {metric} {early.best:.4g}; all the rest is of step {step:,}")]
    if early.since >= early.config.patience:
        rows.insert(0, ("stopped early", f"{metric} got no better in {early.since} measurements"))
    return rows


def say(title: str, rows: Rows) -> None:
    """Print a table of at most `WIDTH` columns, plain where there is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    table = Table(box=None, show_header=False, pad_edge=False, title=Text(title, "bold"), title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    console.print()
    console.print(table)


def _scaled(figures: Mapping[str, float]) -> str:
    if not figures:
        return ""
    before, after, temperature = (figures[name] for name in ("ece_unscaled", "ece_scaled", "temperature"))
    return f"; at temperature {temperature:.3g}, on the half it was not fitted to: {before:.2f} % -> {after:.2f} %"


def _cut(name: str) -> str:
    return name if len(name) <= LONG else f"{name[: LONG - 3]}..."
