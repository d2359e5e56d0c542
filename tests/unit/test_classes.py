"""The classes of a run: one list for training and validation, and every label in it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.errors import InputError
from penstock.streams.classes import class_names
from penstock.streams.data import Data
from penstock.streams.sets.manifest import MANIFEST, Manifest
from tests.shards import key_of, write_set


def write(folder: Path, sizes=(6, 5), names: tuple[str, ...] | None = ("cat", "dog", "owl"), label=lambda n: n % 3):
    """A set whose manifest says these names."""
    made = write_set(folder, sizes, label=label)
    replace(made, classes=names).save(folder)
    return folder


def names_of(train: Path, val: Path | None = None) -> tuple[str, ...]:
    return class_names(Data(Data.Config(train=train, val=val)))


def test_names_come_from_the_training_set(tmp_path):
    train, val = write(tmp_path / "train"), write(tmp_path / "val", (4,))
    assert names_of(train) == names_of(train, val) == ("cat", "dog", "owl")


def test_sets_without_names_have_numbers_up_to_the_largest_label_of_training(tmp_path):
    """The largest label may lie in any shard, and no sample may have those below it."""
    train = write(tmp_path / "train", (3, 4, 2), None, label=lambda n: 11 if n == 5 else 2)
    assert names_of(train) == tuple(str(number) for number in range(12))
    assert names_of(train, write(tmp_path / "val", (2,), None, label=lambda n: 11)) == names_of(train)


def test_a_set_with_names_beside_one_without(tmp_path):
    train = write(tmp_path / "train")
    assert names_of(train, write(tmp_path / "val", (4,), None)) == ("cat", "dog", "owl")


def test_a_class_that_validation_lacks_is_no_mistake(tmp_path):
    assert len(names_of(write(tmp_path / "train"), write(tmp_path / "val", (4,), label=lambda n: 0))) == 3


@pytest.mark.parametrize(
    ("val", "words"),
    [
        ({"names": ("cat", "dog", "fox", "owl")}, "the training set has 3 classes and .*val has 4; 'fox'"),
        ({"names": ("cat", "owl", "dog")}, "same classes in another order: label 1 is 'owl' there and 'dog'"),
        ({"names": ("cat", "dog", "fox")}, "other classes: label 2 is 'fox' there and 'owl'"),
        ({"label": lambda n: -1 if n in (2, 7) else 0}, "data.val: 2 of 11 samples of .*val have no label"),
        (
            {"names": None, "label": lambda n: 3 if n == 8 else 1},
            f"data.val: sample {key_of(8)} of .*val has label 3, but there are 3 classes, 0 to 2",
        ),
    ],
)
def test_validation_that_does_not_agree_is_refused(tmp_path, val, words):
    with pytest.raises(InputError, match=words):
        names_of(write(tmp_path / "train"), write(tmp_path / "val", **val))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"label": lambda n: -1}, "data.train: 11 of 11 samples"),
        ({"names": ("cat",), "label": lambda n: 0}, "one class alone"),
        ({"names": None, "label": lambda n: 0}, "one class alone"),
    ],
)
def test_a_training_set_that_cannot_be_learned_is_refused(tmp_path, train, words):
    with pytest.raises(InputError, match=words):
        names_of(write(tmp_path / "train", **train))


def test_the_manifests_say_what_the_tests_mean(tmp_path):
    folder = write(tmp_path, label=lambda n: -1 if n == 0 else 1)
    said = json.loads((folder / MANIFEST).read_text())
    assert Manifest.load(folder).unlabelled == 1 and said["classes"] == ["cat", "dog", "owl"]
