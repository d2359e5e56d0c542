"""`penstock evaluate`, from the command line to the table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.cli import main
from tests.shards import png, write_set

OPTIONS = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def _image(number: int) -> bytes:
    """Class `number % 10` by brightness, so that even an untrained network tells the classes apart."""
    noise = np.random.default_rng(number).integers(0, 8, (8, 8, 3), dtype=np.uint8)
    return png(noise + np.uint8(24 * (number % 10)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with packed `train` and `val`, an unlabelled set, and a run that exported a tiny ViT."""
    from penstock.backbones import Backbone
    from penstock.export import export_backbone

    folder = tmp_path_factory.mktemp("evaluate")
    write_set(folder / "train", [60, 40], _image)
    write_set(folder / "val", [30], _image)
    write_set(folder / "unlabelled", [20], _image, label=lambda number: -1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = Backbone.Config(name="vit_tiny_patch16_224", size=8, options=OPTIONS)
        export_backbone(Backbone(config).state_dict(), config, folder / "run" / "export")
    return folder


def evaluate(place: Path, *args: str) -> int:
    return main(["evaluate", str(place / "run"), *args, "--workers", "0"])


def test_json(place, capsys):
    quick = ["--set", "linear.epochs=1", "--set", "linear.draws=2", "--set", "linear.labels_per_class=[2]"]
    assert evaluate(place, str(place), "--set", "knn.k=5", *quick, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == {"train": 100, "val": 30}
    assert found["metrics"]["knn_top1"] > 50
    assert {"linear_top1", "linear_top5", "linear_top1_2_per_class"} <= found["metrics"].keys()
    assert 0 < found["health"]["spread"] < 1


def test_table_of_sets_named_one_by_one(place, capsys):
    sets = [str(place / "val"), "--val", str(place / "train")]
    assert evaluate(place, *sets, "--only", "knn", "--untrained", "--limit", "25") == 0
    shown = capsys.readouterr().out
    assert "untrained: 25 training, 25 validation" in shown
    assert "knn_top1" in shown and "linear" not in shown


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["{0}", "--only", "knn", "--set", "knn.kk=1"], "knn.kk: unknown key; did you mean 'k'"),
        (["{0}", "--only", "knn", "--set", "augment.name=resize_crp"], "did you mean 'resize_crop'"),
        (["{0}", "--only", "knn", "--set", "knn"], "not of the form key=value"),
        (["{0}", "--only", "knm"], "did you mean 'knn'"),
        (["{0}/run"], "not a folder"),
        (["{0}/unlabelled", "--val", "{0}/val", "--only", "knn"], "needs labels"),
    ],
)
def test_wrong_input_is_told(place, capsys, args, says):
    assert evaluate(place, *(arg.format(place) for arg in args)) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_export_is_told(place, capsys):
    assert main(["evaluate", str(place), str(place)]) == 2
    assert "is no export and holds none" in capsys.readouterr().err
