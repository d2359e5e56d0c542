"""Pictures of a classifier's mistakes: the images it is surest and wrong about, and the classes it takes for others."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.classification import Judged
from penstock.evaluate._features import FeatureSet
from penstock.streams.evaluation import EvalStream

SHOWN, COLUMNS = 24, 6  # images in a sheet, and in a row of it
MOST_CLASSES = 20  # rows of a matrix that can still be read
CELL, DPI = 0.36, 100  # inches a class takes, pixels per inch
NAME = 14  # letters of a class's name under an image or beside a row


def confident_mistakes(
    answers: FeatureSet, judged: Judged, classes: Sequence[str], images: EvalStream
) -> np.ndarray | None:
    """A sheet of the mistakes the classifier was surest of, uint8 [H, W, 3]; None where there is none to show."""
    from penstock.augment._sheet import Cell, compose

    wrong = (~judged.correct).nonzero()[:, 0]
    surest = wrong[judged.confidence[wrong].argsort(descending=True, stable=True)][:SHOWN].tolist()
    cells = []
    for row in surest:
        view = images.view(int(answers.positions[row]))
        said, label = int(answers.features[row].argmax()), int(answers.labels[row])
        caption = f"said {short(classes[said])} {judged.confidence[row]:.2f}", f"is {classes[label]}"
        pixels = None if view is None else view.permute(1, 2, 0).numpy()
        cells.append(Cell(pixels, caption, "cannot be read"))
    if not cells:
        return None
    heading = f"{len(cells)} of {len(wrong)} mistakes, the surest first, with the confidence before scaling"
    rows = [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)]
    return np.asarray(compose([heading, *rows]))


def confusion(answers: Tensor, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """How often images of a class (rows) are taken for another (columns), in per cent: uint8 [3, height, width].

    With more classes than can be read, those of the most confused pairs.

    Args:
        answers, labels: int64 [n].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = shown_classes(answers, labels, len(classes))
    shares = confusion_shares(answers, labels, chosen)
    names = [short(classes[label]) for label in chosen]
    side = CELL * len(chosen)
    figure = Figure(figsize=(side + 2.6, side + 2.2), dpi=DPI, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    for row, column in (shares >= 0.5).nonzero().tolist():
        value = float(shares[row, column])
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", size=8, color="w" if value > 55 else "k")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("answered")
    axes.set_ylabel("is")
    what = "" if len(chosen) == len(classes) else f", {len(chosen)} of {len(classes)} classes: the most confused"
    axes.set_title(f"per cent of a row's images{what}", size=9, loc="left", x=0)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1).contiguous()


def confused_pairs(answers: Tensor, labels: Tensor, classes: int) -> list[tuple[int, int, float]]:
    """(label, answer, per cent of the label's images) of all that is confused, the most confused first.

    Costs memory for the mistakes there are, not for all pairs of classes.
    """
    wrong = answers != labels
    pairs, counts = (labels[wrong] * classes + answers[wrong]).unique(return_counts=True)
    shares = 100 * counts.double() / labels.bincount(minlength=classes)[pairs // classes]
    order = shares.argsort(descending=True, stable=True)
    return [
        (pair // classes, pair % classes, share)
        for pair, share in zip(pairs[order].tolist(), shares[order].tolist(), strict=True)
    ]


def shown_classes(answers: Tensor, labels: Tensor, classes: int) -> list[int]:
    """All classes in label order, or at most `MOST_CLASSES` of the most confused pairs, a pair side by side."""
    if classes <= MOST_CLASSES:
        return list(range(classes))
    chosen: dict[int, None] = {}
    for label, answer, _ in confused_pairs(answers, labels, classes):
        if len({*chosen, label, answer}) <= MOST_CLASSES:
            chosen |= {label: None, answer: None}
    return list(chosen) or list(range(MOST_CLASSES))


def confusion_shares(answers: Tensor, labels: Tensor, chosen: Sequence[int]) -> Tensor:
    """Per cent of the images of each chosen class (row) answered as each (column), fp64 [n, n]; 0 without images."""
    rows = []
    for label in chosen:
        given = answers[labels == label]
        rows.append([100 * (given == answer).double().sum().item() / max(len(given), 1) for answer in chosen])
    return torch.tensor(rows, dtype=torch.float64)


def short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 2]}.."
