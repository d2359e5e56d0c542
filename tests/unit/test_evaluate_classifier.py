"""`penstock evaluate` of a classifier gives what its run measured, and refuses what would mean something else."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.recipe import Finetune
from penstock.calibration import halves
from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG
from penstock.export import read_about
from penstock.recipe import Source, check
from penstock.streams.sets.manifest import Manifest
from tests.runs.runner import history
from tests.shards import damage, write_set

IMAGES, STEPS = 61, 12
VIT = {"name": "vit_tiny_patch16_224", "size": 12, "channels": 1, "mean": [0.5], "std": [0.5]}
VIT["options"] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def finetune(rank: int, world: int, folder: Path) -> int:
    """A few steps on digits, at another size than it is measured at."""
    from finetune.run import start

    values: dict[str, Any] = {
        "name": "run",
        "out": str(folder),
        "duration": f"{STEPS} steps",
        "batch": 32,
        "data": {"train": str(folder / "train"), "val": str(folder / "val"), "channels": 1, "workers": 0},
        "augment": {"name": "resize_crop", "size": 12},
        "backbone": VIT,
        "head": {"norm": "batch"},
        "optim": {"lr": 5e-3},
        "engine": {"precision": "fp32"},
        "monitor": {"batch": 8, "size": 16, "crop_pct": 0.8, "pictures": None},
        "tracking": {"enabled": False},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        return start(check(Finetune, Source(values=values)))


@pytest.fixture(scope="module")
def place(tmp_path_factory, ranks) -> Path:
    """A folder with packed digits `train` and `val`, and a finished `run`."""
    folder = tmp_path_factory.mktemp("classifier")
    for part, name, samples in (("train", "train", 160), ("test", "val", IMAGES)):
        pack = ["shards", "pack", f"digits:{part}", str(folder / name), "--limit", str(samples)]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(pack) == DONE
    assert ranks(1).run(finetune, folder) == [DONE]
    return folder


@pytest.fixture
def told(place, capsys) -> Callable[..., dict[str, Any]]:
    def run(data: Path, *args: str) -> dict[str, Any]:
        code = main(["evaluate", str(place / "run"), str(data), "--workers", "0", "--format", "json", *args])
        captured = capsys.readouterr()
        assert code == DONE, captured.err
        return json.loads(captured.out, parse_constant=pytest.fail)

    return run


@pytest.fixture
def refused(place, capsys) -> Callable[..., str]:
    def run(*args: str) -> str:
        assert main(["evaluate", *args, "--workers", "0"]) == INPUT_WRONG
        said = capsys.readouterr().err
        assert said.startswith("penstock: ") and "Traceback" not in said
        return " ".join(said.split())

    return run


def arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as found:
        return dict(found)


def test_the_run_is_measured_again(place, told, tmp_path):
    kept = tmp_path / "kept.npz"
    found = told(place, "--predictions", str(kept))
    own, again = arrays(place / "run" / "predictions.npz"), arrays(kept)
    assert own.keys() == again.keys() and len(own["labels"]) == IMAGES
    for name in ("positions", "labels"):
        assert own[name].dtype == again[name].dtype and (own[name] == again[name]).all()
    np.testing.assert_allclose(again["logits"], own["logits"], rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == [kept.name]

    run = {name.removeprefix("final/"): v for (name, _), v in history(place / "run").items() if "final/" in name}
    for name in ("top1", "top5", "nll", "ece", "brier"):
        assert found["metrics"][name] == pytest.approx(run[name], rel=1e-4), name
    assert found["temperature"] == run["temperature"] != 1
    assert found["preprocessing"] == {"size": 16, "crop_pct": 0.8, "interpolation": "bicubic"}
    assert (found["samples"], found["unreadable"], found["warnings"]) == (IMAGES, 0, [])
    per_class = dict(line.split("\t")[::-1] for line in (place / "run" / "per_class.tsv").read_text().splitlines()[1:])
    assert {name: f"{score:.2f}" for name, score in found["per_class"].items()} == per_class


def test_the_temperature_divides_the_logits(place, told):
    """All images are scaled; on the half that the run kept for testing its temperature, the figure is the run's."""
    run = arrays(place / "run" / "predictions.npz")
    found = told(place / "val")
    logits = run["logits"].astype(np.float64) / found["temperature"]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(IMAGES), run["labels"]]
    assert found["metrics"]["nll_scaled"] == pytest.approx(losses.mean(), rel=1e-4)
    assert found["metrics"]["nll_scaled"] != pytest.approx(found["metrics"]["nll"], rel=1e-3)
    _, test = halves(torch.from_numpy(run["positions"]), Finetune.model_fields["seed"].default)
    assert history(place / "run")["final/nll_scaled", STEPS] == pytest.approx(losses[test.numpy()].mean(), rel=1e-4)


def test_preparation_and_precision_can_be_asked_for(place, told, tmp_path):
    def logits(*args: str) -> np.ndarray:
        told(place / "val", "--predictions", str(tmp_path / "kept.npz"), *args)
        return arrays(tmp_path / "kept.npz")["logits"]

    own = arrays(place / "run" / "predictions.npz")["logits"]
    assert told(place, "--size", "12", "--crop-pct", "1")["preprocessing"] == {
        "size": 12,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    assert np.abs(logits("--crop-pct", "1") - own).max() > 1e-2
    assert np.abs(logits("--size", "12") - own).max() > 1e-2
    half = np.abs(logits("--precision", "bf16") - own).max()
    assert 1e-4 < half < 0.1
    np.testing.assert_allclose(logits("--batch", "7", "--limit", "1000"), own, rtol=1e-4, atol=1e-5)


def test_table(place, capsys):
    assert main(["evaluate", str(place / "run"), str(place), "--workers", "0"]) == DONE
    shown = " ".join(capsys.readouterr().out.split())
    temperature = read_about(place / "run" / "export")["temperature"]
    for words in (
        "top-1",
        f"{IMAGES} images",
        "top-5",
        f"at temperature {temperature:.3g}",
        "worst classes",
        "crop_pct 0.8",
    ):
        assert words in shown


def test_unreadable_images_are_counted(place, told, tmp_path):
    shutil.copytree(place / "val", tmp_path / "val")
    for number in (3, 40):
        damage(Manifest.load(tmp_path / "val"), number)
    kept = tmp_path / "kept.npz"
    found = told(tmp_path, "--predictions", str(kept))
    assert (found["samples"], found["unreadable"]) == (IMAGES - 2, 2)
    assert found["warnings"] == ["2 images could not be read and are left out; `penstock shards verify`"]
    assert arrays(kept)["positions"].tolist() == [n for n in range(IMAGES) if n not in (3, 40)]
    run = arrays(place / "run" / "predictions.npz")
    right = np.delete(run["logits"].argmax(1) == run["labels"], (3, 40))
    assert found["metrics"]["top1"] == pytest.approx(100 * right.mean())


def renamed(place: Path, folder: Path, classes: tuple[str, ...] | None) -> str:
    shutil.copytree(place / "val", folder)
    replace(Manifest.load(folder), classes=classes).save(folder)
    return str(folder)


def test_other_classes_are_refused(place, refused, told, tmp_path):
    run, names = str(place / "run"), read_about(place / "run" / "export")["classes"]
    swapped = renamed(place, tmp_path / "swapped", (names[1], names[0], *names[2:]))
    said = refused(run, swapped)
    assert f"{swapped} has the same classes in another order: label 0 is {names[1]!r} there and {names[0]!r}" in said
    other = renamed(place, tmp_path / "other", (*names[:9], "spoon"))
    assert "has other classes: label 9 is 'spoon' there" in refused(run, other)
    more = renamed(place, tmp_path / "more", (*names, "spoon"))
    assert "has 10 classes and" in refused(run, more)
    assert told(Path(renamed(place, tmp_path / "unnamed", None)))["metrics"] == told(place)["metrics"]


def test_labels_that_mean_nothing_are_refused(place, refused, tmp_path):
    run = str(place / "run")
    many = write_set(tmp_path / "many", [12], label=lambda number: number)
    replace(many, classes=None).save(many.root)
    assert "has label 11, but the classifier has 10 classes, 0 to 9" in refused(run, str(many.root))
    few = write_set(tmp_path / "few", [4], label=lambda number: -1 if number else 0)
    replace(few, class_counts={0: 1}).save(few.root)
    assert "3 of 4 samples" in refused(run, str(few.root))


def test_options_that_do_not_fit_are_refused(place, refused, tmp_path):
    run, data = str(place / "run"), str(place)
    assert "--only is an option of features" in refused(run, data, "--only", "knn")
    assert "--crop-pct is an option of a classifier" in refused(run, data, "--features", "--crop-pct", "1")
    assert "--size 13" in (said := refused(run, data, "--size", "13")) and "patch" in said
    assert "crop_pct: 1.5 cannot be used" in refused(run, data, "--crop-pct", "1.5")
    assert "crop_pct: 0.0 cannot be used" in refused(run, data, "--crop-pct", "0")
    assert "make its folder first" in refused(run, data, "--predictions", str(tmp_path / "absent" / "kept.npz"))


def test_features_of_a_classifier(place, capsys):
    command = ["evaluate", str(place / "run"), str(place), "--features", "--only", "knn", "--workers", "0"]
    assert main([*command, "--format", "json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert "knn_top1" in found["metrics"] and found["samples"] == {"train": 160, "val": IMAGES}
