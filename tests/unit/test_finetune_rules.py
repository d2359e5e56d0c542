"""Options of a finetuning recipe that would do nothing beside others are refused."""

from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import Finetune
from penstock.errors import InputError
from penstock.recipe import Source, check
from tests.shards import write_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_set(folder, [8], label=lambda number: number % 2)
    return folder


def recipe(folder: Path, **blocks: Any) -> Source:
    plain = {
        "name": "run",
        "duration": "1 epochs",
        "batch": 8,
        "data": {"train": str(folder), "val": str(folder)},
        "augment": {"name": "standard", "size": 224},
        "backbone": {"name": "vit_tiny_patch16_224", "weights": "timm"},
        "optim": {"lr": 0.1},
    }
    return Source(plain | blocks)


IDLE: dict[str, dict[str, Any]] = {
    "optim.l2_sp": {"optim": {"lr": 0.1, "l2_sp": 0.01}},
    "optim.layer_decay": {"optim": {"lr": 0.1, "layer_decay": 0.75}},
    "drop.path": {"drop": {"path": {"name": "linear", "start": 0.0, "end": 0.1}}},
    "drop.attention": {"drop": {"attention": 0.1}},
    "drop.proj": {"drop": {"proj": 0.1}},
    "drop.patch": {"drop": {"patch": 0.1}},
}


@pytest.mark.parametrize("key", IDLE)
def test_a_frozen_backbone_takes_no_options(folder: Path, key: str) -> None:
    check(Finetune, recipe(folder, **IDLE[key]))
    with pytest.raises(InputError) as caught:
        check(Finetune, recipe(folder, transfer={"name": "head"}, **IDLE[key]))
    said = str(caught.value)
    assert "1 mistake:" in said and f"{key}: with transfer=head the backbone is frozen" in said
    remedy = 1 if key == "optim.layer_decay" else 0
    assert f"set {key}={remedy}, or train the backbone" in said


def test_dropout_before_the_classifier_works_on_frozen_features(folder: Path) -> None:
    check(Finetune, recipe(folder, transfer={"name": "head"}, drop={"head": 0.5}))
