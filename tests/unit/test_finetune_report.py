"""Tables and pictures of a run's end, from made-up answers."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.confusion import (
    MOST_CLASSES,
    SHOWN,
    confident_mistakes,
    confused_pairs,
    confusion,
    confusion_shares,
    shown_classes,
)
from finetune.report import WIDTH, Report, places, say
from penstock.augment._sheet import CELL, LINE, MARGIN
from penstock.augment.resize_crop import ResizeCrop
from penstock.classification import judge
from penstock.evaluate._features import FeatureSet
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from tests.shards import damage, png, write_set


class Tracked:
    def __init__(self) -> None:
        self.pictures: dict[str, Any] = {}

    def picture(self, step: int, name: str, image: Any) -> None:
        self.pictures[name] = image

    def artifact(self, path: Path) -> None:
        assert path.is_file()


def colour(number: int) -> tuple[int, int, int]:
    return (37 * number % 256, 91 * number % 256, 53 * number % 256)


def stream(folder: Path, sizes: tuple[int, ...], damaged: tuple[int, ...] = ()) -> EvalStream:
    """Images of one colour each, which tells their number."""
    manifest = write_set(folder, sizes, lambda number: png(np.full((8, 8, 3), colour(number), dtype=np.uint8)))
    for number in damaged:
        damage(manifest, number)
    return EvalStream(Images(manifest), ResizeCrop(ResizeCrop.Config(size=8.0, crop_pct=1.0)), batch=4)


def answers(answered: list[int], labels: list[int], sure: list[float], classes: int, unreadable: int = 0) -> FeatureSet:
    """Logits that give `answered` with confidence `sure`, the rest spread evenly."""
    rows = []
    for answer, confidence in zip(answered, sure, strict=True):
        row = torch.full((classes,), (1 - confidence) / (classes - 1))
        row[answer] = confidence
        rows.append(row.log())
    return FeatureSet(torch.stack(rows), torch.tensor(labels), torch.arange(len(labels)), unreadable)


def some(classes: int, samples: int, wrong: float = 0.4) -> tuple[list[int], list[int]]:
    dice = random.Random(classes)
    labels = [dice.randrange(classes) for _ in range(samples)]
    return [dice.randrange(classes) if dice.random() < wrong else label for label in labels], labels


# Confusions -----------------------------------------------------------------------------------------------------


def test_confused_pairs_are_counted_one_by_one():
    answered, labels = some(12, 300)
    counts, sizes = Counter(zip(labels, answered, strict=True)), Counter(labels)
    expected = {pair: 100 * count / sizes[pair[0]] for pair, count in counts.items() if pair[0] != pair[1]}
    found = confused_pairs(torch.tensor(answered), torch.tensor(labels), 12)
    assert {(label, answer): share for label, answer, share in found} == pytest.approx(expected)
    assert [share for *_, share in found] == sorted(expected.values(), reverse=True)


def test_shares_are_of_a_rows_images():
    answered, labels = some(6, 80)
    chosen = [4, 1, 3]
    found = confusion_shares(torch.tensor(answered), torch.tensor(labels), chosen)
    for row, label in enumerate(chosen):
        for column, answer in enumerate(chosen):
            given = [a for a, truth in zip(answered, labels, strict=True) if truth == label]
            assert found[row, column] == pytest.approx(100 * given.count(answer) / len(given))


def test_few_classes_are_shown_whole_and_of_many_the_most_confused():
    answered, labels = torch.arange(1000) % 100, torch.arange(1000) % 100
    assert shown_classes(answered % 20, labels % 20, 20) == list(range(20))
    assert len(shown_classes(answered, labels, 100)) == MOST_CLASSES  # nothing is confused
    answered[(labels == 70) & (torch.arange(1000) < 800)] = 71
    answered[(labels == 9) & (torch.arange(1000) < 300)] = 50
    assert shown_classes(answered, labels, 100) == [70, 71, 9, 50]


def test_a_class_without_images_and_one_class_of_many_are_drawn():
    picture = confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), ["a", "b", "a class with a long name", "d"])
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3
    many = confusion(torch.tensor([3, 4]), torch.tensor([4, 4]), [f"n{number:08d}" for number in range(21841)])
    assert max(many.shape) < 600, "two classes are all that is confused"


# Mistakes -------------------------------------------------------------------------------------------------------


def cell_colours(sheet: np.ndarray, count: int) -> list[tuple[int, ...]]:
    """The colour in the middle of each image of the sheet."""
    found = []
    for place in range(count):
        top = MARGIN + LINE + MARGIN + place // 6 * (CELL + 2 * LINE + MARGIN)
        found.append(tuple(sheet[top + CELL // 2, MARGIN + place % 6 * (CELL + MARGIN) + CELL // 2].tolist()))
    return found


def test_the_surest_mistakes_are_shown_with_their_own_images(tmp_path):
    dice = random.Random(1)
    answered, labels = some(5, 70, wrong=0.7)
    sure = [dice.uniform(0.3, 0.99) for _ in labels]
    given = answers(answered, labels, sure, 5)
    sheet = confident_mistakes(given, judge(given.features, given.labels), "abcde", stream(tmp_path, (30, 40)))
    wrong = [n for n in range(70) if answered[n] != labels[n]]
    expected = sorted(wrong, key=lambda n: -sure[n])[:SHOWN]
    assert len(wrong) > SHOWN and sheet is not None
    assert cell_colours(sheet, SHOWN) == [colour(number) for number in expected]


def test_an_image_that_cannot_be_read_again_and_no_mistake_at_all(tmp_path):
    images = stream(tmp_path, (4,), damaged=(2,))
    given = answers([0, 1, 1, 1], [0, 1, 0, 1], [0.9] * 4, 2)
    sheet = confident_mistakes(given, judge(given.features, given.labels), "ab", images)
    assert sheet is not None and cell_colours(sheet, 1)[0] != colour(2)
    right = answers([0, 1], [0, 1], [0.9, 0.8], 2)
    assert confident_mistakes(right, judge(right.features, right.labels), "ab", images) is None


# The table ------------------------------------------------------------------------------------------------------


def report(folder: Path, given: FeatureSet, names: list[str]) -> Report:
    return Report(folder, given, names, Tracked(), 12)  # type: ignore[arg-type]


def test_rows_by_hand(tmp_path):
    answered, labels = [0, 0, 1, 1, 2, 0, 0, 0], [0, 0, 1, 0, 2, 2, 2, 0]
    made = report(tmp_path, answers(answered, labels, [0.8] * 8, 4, unreadable=3), ["cat", "dog", "owl", "elk"])
    rows = dict(made.rows(made.calibration(seed=0), None))
    # 5 of 8, where the classifier says 80 %.
    assert rows["top-1"].startswith("62.50 % ± 17.12 (standard error; 8 ")
    assert rows["ECE"].startswith("17.50 %; at temperature ") and "NLL" in rows and "top-5" not in rows
    assert rows["left out"].startswith("3 validation images")
    assert rows["classes"] == "owl 33.3 %, cat 75.0 %, dog 100.0 %"
    assert rows[""] == "1 of 4 classes have no validation image"
    assert rows["most confused"] == "66.7 % of owl are taken for cat"


def test_a_single_image_has_no_temperature(tmp_path):
    made = report(tmp_path, answers([0], [0], [0.8], 2), ["cat", "dog"])
    assert made.calibration(0) == {} and dict(made.rows({}, None))["ECE"] == "20.00 %"


def test_files_and_pictures(tmp_path):
    answered, labels = some(3, 9)
    made = report(tmp_path, answers(answered, labels, [0.8] * 9, 3), ["b", "a", "c"])
    made.write_files()
    made.draw_pictures(stream(tmp_path / "set", (9,)))
    assert set(made.tracker.pictures) == {"reliability", "mistakes", "confusion"}  # type: ignore[attr-defined]
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as found:
        assert found["labels"].tolist() == labels and found["logits"].argmax(1).tolist() == answered
    lines = (tmp_path / "per_class.tsv").read_text().splitlines()
    scores = [float(line.split("\t")[0]) for line in lines[1:]]
    assert lines[0] == "top1\tclass" and scores == sorted(scores)
    assert not list(tmp_path.glob(".*partial"))


def test_a_table_is_plain_and_fits_outside_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    names = [f"a class with [red]markup[/red] and a long name, number {number}" for number in range(40)]
    answered, labels = some(40, 300)
    made = report(tmp_path / ("deep/" * 30), answers(answered, labels, [0.5] * 300, 40), names)
    say("run", made.rows({}, None) + places(made.folder))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= WIDTH and "\x1b" not in said
    assert "[red]markup" in said and "deep/deep" in said
