"""Bad input of `python -m finetune`, as a person meets it: exit code 2, and one clear message without a traceback."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from finetune.recipe import Finetune
from penstock.errors import DONE, INPUT_WRONG
from penstock.stage import main
from penstock.streams.sets.manifest import Manifest
from tests.shards import write_set

RECIPE = """
name: run
out: {folder}
duration: 2 steps
batch: 8
data: {{train: {folder}/train, val: {folder}/val, workers: 0}}
augment: {{name: resize_crop, size: 16, crop_pct: 1}}
backbone:
  name: vit_tiny_patch16_224
  size: 16
  options: {{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}}
optim: {{lr: 1.0e-3}}
engine: {{precision: fp32}}
monitor: {{pictures: null, at_start: false}}
tracking: {{enabled: false}}
"""
RESNET = "backbone={name: test_resnet, size: 16}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two good sets of three classes, and the recipe."""
    folder = tmp_path_factory.mktemp("input")
    for name, samples in (("train", 24), ("val", 9)):
        write_set(folder / name, [samples], label=lambda number: number % 3)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return folder


def command(rank: int, world: int, words: list[str]) -> tuple[int, str]:
    """Exit code of the command, and what it said on standard error."""
    from finetune.__main__ import start

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main("finetune", Finetune, start, words)
    return code, " ".join(said.getvalue().split())


@pytest.fixture
def refused(ranks, folder, tmp_path):
    """The message of a run that is refused."""

    def run(*overrides: str) -> str:
        words = [str(folder / "recipe.yaml"), f"out={tmp_path}", *overrides]
        ((code, said),) = ranks(1).run(command, words)
        assert code == INPUT_WRONG, said
        assert "Traceback" not in said and said.startswith("finetune: ")
        return said

    return run


def labelled(folder: Path, labels: list[int], classes: tuple[str, ...] | None) -> Path:
    """A set whose manifest names `classes`, whatever labels its samples have."""
    manifest = write_set(folder, [len(labels)], label=labels.__getitem__)
    counts = {label: labels.count(label) for label in set(labels) if label >= 0}
    Manifest(manifest.shards, manifest.samples, classes, counts, manifest.digest_of_ids).save(folder)
    return folder


def test_the_recipe_runs(ranks, folder, tmp_path):
    assert ranks(1).run(command, [str(folder / "recipe.yaml"), f"out={tmp_path}"])[0][0] == DONE


def test_another_number_of_classes(refused, tmp_path):
    val = labelled(tmp_path / "val", [0, 1, 2, 3], ("class0", "class1", "class2", "more"))
    said = refused(f"data.val={val}")
    assert "the training set has 3 classes" in said and "has 4" in said and "'more'" in said and "pack the data" in said


def test_classes_in_another_order(refused, tmp_path):
    val = labelled(tmp_path / "val", [0, 1, 2], ("class1", "class0", "class2"))
    said = refused(f"data.val={val}")
    assert "same classes in another order" in said and "label 0 is 'class1'" in said and "folders" in said


def test_an_empty_validation_set(refused, tmp_path):
    (tmp_path / "val").mkdir()
    Manifest((), 0, ("class0", "class1", "class2"), {}, 0).save(tmp_path / "val")
    assert "data.val" in (said := refused(f"data.val={tmp_path}/val")) and "no sample" in said


def test_no_validation_set(refused):
    assert "data.val: a classifier is measured on a validation set" in refused("data.val=null")


def test_labels_out_of_range(refused, tmp_path):
    val = labelled(tmp_path / "val", [0, 1, 7], None)
    said = refused(f"data.val={val}")
    assert "data.val: sample sample000002" in said and "has label 7, but there are 3 classes, 0 to 2" in said


def test_images_without_labels(refused, tmp_path):
    train = labelled(tmp_path / "train", [-1] * 8 + [1] * 8, None)
    said = refused(f"data.train={train}")
    assert "data.train: 8 of 16 samples" in said and "folder per class" in said


def test_smoothing_is_applied_once(refused):
    said = refused("loss.smoothing=0.1", "mix.mixup=0.2", "mix.label_smoothing=0.1")
    assert "mix.label_smoothing" in said or "mix: label_smoothing" in said
    assert "set loss.smoothing" in said


@pytest.mark.parametrize("key", ["augment.size", "monitor.size", "backbone.size"])
def test_a_size_that_the_patch_does_not_divide(refused, key):
    said = refused(f"{key}=18")
    assert key in said and "does not divide" in said and "would do" in said and said.count(key) == 1


def test_weights_that_match_too_little(refused, tmp_path):
    from penstock.backbones import Backbone

    options = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    state = Backbone(Backbone.Config(name="vit_tiny_patch16_224", size=16, options=options)).model.state_dict()
    held = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    save_file(held, tmp_path / "half.safetensors")
    said = refused(f"backbone.weights={tmp_path}/half.safetensors")
    assert f"12 of {len(state)} tensors are missing (blocks." in said
    assert "half.safetensors" in said
    assert f"set backbone.match below {len(held) / len(state):.2f}" in said


def test_weights_that_are_not_there(refused):
    said = refused("backbone.weights=/nowhere/export")
    assert "backbone.weights: there is no file or folder '/nowhere/export'" in said


def test_a_classifier_of_other_classes(refused, ranks, folder, tmp_path):
    """An export of a run whose classes have none of these names."""
    names = [labelled(tmp_path / part, [0, 1, 2] * 8, ("cat", "dog", "eel")) for part in ("a", "b")]
    out = tmp_path / "first"
    words = [str(folder / "recipe.yaml"), f"out={out}", f"data.train={names[0]}", f"data.val={names[1]}"]
    assert ranks(1).run(command, words)[0][0] == DONE
    said = refused(f"head.init={out}/run/export")
    assert "none of the 3 classes (class0, class1, class2)" in said and "(cat, dog, eel)" in said


def test_a_batch_larger_than_the_set(refused):
    assert "batch 32 is larger than the training set of 24 images" in refused("batch=32")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.zero=1", "engine.sam={}"], ["engine.sam", "zero: 1", "fairscale #989", "use zero: 0"]),
        (["engine.zero=1", "engine.clip_by=agc", "engine.clip=0.01"], ["engine.clip_by", "agc", "use zero: 0"]),
        (["engine.zero=1", "optim.name=lamb"], ["optim.name: lamb", "ZeRO-1", "engine.zero=0"]),
        ([RESNET, "drop.patch=0.1"], ["drop.patch", "test_resnet has no patch dropout", "set it to 0"]),
        (["backbone.options.drop_path_rate=0.1", "drop.path=0.1"], ["drop_path_rate is set by drop.path"]),
        (["data.repeats=16"], ["data.repeats", "16 repeats", "batch of 8"]),
        (["head.norm=batch", "engine.accumulation=2"], ["head.norm", "engine.accumulation=1"]),
        (["los.smoothing=0.1"], ["los", "did you mean 'loss'?"]),
    ],
)
def test_parts_that_do_not_go_together(refused, overrides, words):
    said = refused(*overrides)
    assert "has 1 mistake:" in said, said
    for word in words:
        assert word in said, said


def test_an_odd_last_batch_is_measured_exactly(ranks, folder, tmp_path):
    """103 images on 4 ranks, in batches of 8: each is measured once."""
    write_set(tmp_path / "val", [60, 43], label=lambda number: number % 3)
    words = [str(folder / "recipe.yaml"), f"out={tmp_path}", f"data.val={tmp_path}/val", "monitor.batch=8"]
    assert [code for code, _ in ranks(4).run(command, words)] == [DONE] * 4
    with np.load(tmp_path / "run/predictions.npz", allow_pickle=False) as found:
        assert found["positions"].tolist() == list(range(103))
        assert found["labels"].tolist() == [number % 3 for number in range(103)]
        top1 = 100 * (found["logits"].argmax(1) == found["labels"]).mean()
    lines = (tmp_path / "run/journal.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = {name: value for line in map(json.loads, lines) for name, value in line.get("metrics", {}).items()}
    assert metrics["eval/top1"] == pytest.approx(top1, abs=1e-4)
