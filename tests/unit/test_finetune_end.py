"""The end of a finetuning run: what its export, its predictions, its pictures and its words say of each other."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.recipe import Finetune
from penstock.augment.resize_crop import ResizeCrop
from penstock.backbones.fold import load_folded
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.export import Classifier, load_classifier
from penstock.recipe import Source, check
from penstock.stage import main
from penstock.streams.images import Images
from penstock.streams.sets.manifest import Manifest
from tests.shards import pixels_of, png, write_set

VALIDATION = 53  # images: an odd number for two ranks
TRAINED = {"lr": 5e-3}
CNN = {"name": "resnet10t", "size": 32}
VIT = {"name": "vit_tiny_patch16_224", "size": 32, "mean": [0.5], "std": [0.5]}
VIT["options"] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def picture(number: int) -> bytes:
    """Noise that is neither square nor of the network's size, brighter in a corner that its class decides."""
    pixels = pixels_of(number, 40, 52) // 2
    pixels[:, 13 * (number % 4) : 13 * (number % 4) + 13] += 100
    return png(pixels)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, sizes in (("train", [40, 24]), ("val", [30, VALIDATION - 30])):
        write_set(folder / name, sizes, picture, lambda number: number % 3, size=(40, 52))
    return folder


def recipe_of(data: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "out": str(out),
        "duration": "6 steps",
        "batch": 16,
        "data": {"train": str(data / "train"), "val": str(data / "val"), "workers": 0},
        "augment": {"name": "crop_flip", "size": 32},
        "optim": TRAINED,
        "engine": {"precision": "fp32"},
        "monitor": {"batch": 8, "crop_pct": 0.875},
        "tracking": {"enabled": False},
        **more,
    }


def finetune(rank: int, world: int, values: dict[str, Any]) -> tuple[int, str]:
    from finetune.run import start

    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = start(check(Finetune, Source(values=values)))
    return code, said.getvalue()


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory, ranks) -> tuple[Path, str]:
    """A run of a network with batch norm, with averaged weights and a folded form: its folder and its words."""
    out = tmp_path_factory.mktemp("averaged")
    values = recipe_of(data, out, backbone=CNN, average={"name": "ema", "decay": 0.8}, fold=True)
    (code, said), (other, silent) = ranks(2).run(finetune, values)
    assert code == other == DONE and "top-1" not in silent
    return out / "run", said


@pytest.fixture(scope="module")
def early(data, tmp_path_factory, ranks) -> tuple[Path, str]:
    """A run without batch norm that finds a best measurement and then gets worse until it is ended."""
    out = tmp_path_factory.mktemp("early")
    values = recipe_of(data, out, backbone=VIT, duration="40 steps", optim={"lr": 0.3})
    values["monitor"] |= {"stop_early": {"metric": "eval/nll", "patience": 2}}
    ((code, said),) = ranks(1).run(finetune, values | {"measure": {"every": "2 steps"}})
    assert code == DONE
    return out / "run", said


def predictions(run: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(run / "predictions.npz", allow_pickle=False) as found:
        assert found["positions"].tolist() == list(range(VALIDATION))
        return found["logits"], found["labels"]


def stored(data: Path) -> list[np.ndarray]:
    manifest = Manifest.load(data / "val")
    images = Images(manifest)
    places = [(shard, number) for shard, each in enumerate(manifest.shards) for number in range(each.samples)]
    return [images.load(*place).image for place in places]  # type: ignore[misc]


def prepared(data: Path, classifier: Classifier) -> torch.Tensor:
    """The validation images, uint8, as the export says they are to be prepared."""
    says = classifier.preprocessing
    side = says["test_input_size"][-1]
    resize = ResizeCrop(ResizeCrop.Config(size=side, crop_pct=says["crop_pct"], interpolation=says["interpolation"]))
    return torch.stack([resize.view(image, 0, {"size": side}) for image in stored(data)])


# The export -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["averaged", "early"])
def test_the_export_answers_as_the_run_did(run, data, request):
    import timm

    folder = request.getfixturevalue(run)[0]
    logits, labels = predictions(folder)
    classifier = load_classifier(folder / "export")
    model: Any = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    images = prepared(data, classifier)
    with torch.no_grad():
        ours = classifier(images).numpy()
        timms = model(classifier.backbone.normalize(images)).numpy()
    scale = np.abs(logits).max()
    for found in (ours, timms):
        np.testing.assert_allclose(found / scale, logits / scale, atol=1e-4)
        assert (found.argmax(1) == labels).sum() == (logits.argmax(1) == labels).sum()


@pytest.mark.parametrize("run", ["averaged", "early"])
def test_timm_prepares_images_as_the_run_did(run, data, request):
    """timm's own transform of the export, from pixels to answers; it rounds otherwise when it resizes."""
    import timm

    folder = request.getfixturevalue(run)[0]
    logits, _ = predictions(folder)
    model: Any = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model, use_test_size=True)
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(Image.fromarray(image)) for image in stored(data)])
    classifier = load_classifier(folder / "export")
    assert (images - classifier.backbone.normalize(prepared(data, classifier))).abs().max() < 0.03
    with torch.no_grad():
        found = model(images).numpy()
    assert np.abs(found - logits).max() < 0.02 * np.abs(logits).max()


def test_a_size_and_a_crop_of_timms_own_weights_do_not_go_before(data, tmp_path, ranks):
    """timm's own weights of resnet10t come with a test_crop_pct, which goes before crop_pct where it is kept."""
    import timm

    values = recipe_of(data, tmp_path, backbone={"name": "resnet10t", "size": 32}, duration="1 steps")
    values["monitor"] = {"batch": 8, "crop_pct": 0.75, "size": 40}
    assert ranks(2).run(finetune, values)[0][0] == DONE
    model = timm.create_model(f"local-dir:{tmp_path}/run/export", pretrained=True)
    config = timm.data.resolve_model_data_config(model, use_test_size=True)
    assert config["crop_pct"] == 0.75 and config["input_size"] == (3, 40, 40) and config["crop_mode"] == "center"


# The folded form ------------------------------------------------------------------------------------------------


def test_the_folded_form_gives_the_same_logits(averaged, data):
    folder, said = averaged
    logits, _ = predictions(folder)
    folded = load_folded(folder / "export")
    assert not any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in folded.modules())
    classifier = load_classifier(folder / "export")
    with torch.no_grad():
        found = folded(classifier.backbone.normalize(prepared(data, classifier))).numpy()
    assert np.abs(found - logits).max() < 1e-4 * np.abs(logits).max()
    assert "14 of 14 batch norms folded" in " ".join(said.split())


def test_folding_without_batch_norm_is_refused(data, tmp_path, ranks, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(data, tmp_path, backbone=VIT, fold=True)))
    assert main("finetune", Finetune, lambda recipe, find_lr: 0, [str(recipe), "--check"]) == INPUT_WRONG
    assert "fold: vit_tiny_patch16_224 has LayerNorm" in capsys.readouterr().err
    values = recipe_of(data, tmp_path, backbone={"name": "convnext_atto", "size": 32}, fold=True)
    assert refused(values, ranks) == [
        "fold: convnext_atto has no batch norm to fold into convolutions; leave fold at false"
    ]


def refusal(rank: int, world: int, values: dict[str, Any]) -> str:
    try:
        finetune(rank, world, values)
    except InputError as error:
        return str(error)
    return "none"


def refused(values: dict[str, Any], ranks: Any) -> list[str]:
    return ranks(1).run(refusal, values)


# Words and pictures ---------------------------------------------------------------------------------------------


def test_the_table_says_what_came_out(averaged):
    folder, said = averaged
    logits, labels = predictions(folder)
    table = said[said.index("run: step 6") :]
    assert max(map(len, table.splitlines())) <= 100 and "\x1b" not in said
    right = 100 * (logits.argmax(1) == labels).mean()
    said = " ".join(table.split())
    assert f"top-1 {right:.2f} % ±" in said and f"{VALIDATION} validation images" in said
    figures = {key: value for line in journal(folder) for key, value in line.get("metrics", {}).items()}
    assert f"NLL {figures['final/nll']:.4f}" in said and f"temperature {figures['final/temperature']:.3g}" in said
    assert f"{figures['final/ece_unscaled']:.2f} % -> {figures['final/ece_scaled']:.2f} %" in said
    assert "batch norm 14 layers, statistics over 16 samples" in said
    for file in ("export/config.json", "predictions.npz", "per_class.tsv", "pictures/confusion", "pictures/mistakes"):
        assert (folder / file).exists()
    assert "pictures: confusion, mistakes, reliability" in said and "penstock compare" in said


def test_the_health_of_batch_norm_is_that_of_training(data, tmp_path, ranks):
    """Of statistics that each rank keeps for itself, before they are averaged to be measured with."""
    values = recipe_of(data, tmp_path, backbone=CNN, duration="2 steps", batchnorm={"mode": "local"})
    (code, said), _ = ranks(2).run(finetune, values)
    last = [line["metrics"] for line in journal(tmp_path / "run") if "health/bn_rank_gap" in line.get("metrics", {})][
        -1
    ]
    assert code == DONE and last["health/bn_rank_gap"] > 1e-3
    assert last["health/bn_effective_batch"] == 8 and "statistics over 8 samples" in " ".join(said.split())


def test_a_run_that_ends_early_says_where_the_best_is(early, data):
    folder, said = early
    last = max(line["step"] for line in journal(folder) if "eval/nll" in line.get("metrics", {}))
    measured = {
        line["step"]: line["metrics"]["eval/nll"] for line in journal(folder) if "eval/nll" in line.get("metrics", {})
    }
    best = min((value, step) for step, value in measured.items() if step)[1]
    assert last < 40 and best == last - 4
    words = " ".join(said.split())
    assert f"run: step {last}" in words and "stopped early eval/nll got no better in 2 measurements" in words
    assert f"best: step {best}, eval/nll {measured[best]:.4g}; all the rest is of step {last}" in words
    kept = load_classifier(folder / "best")
    with torch.no_grad():
        logits = kept(prepared(data, kept))
    labels = torch.from_numpy(predictions(folder)[1])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(measured[best], rel=1e-4)


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


# Distillation, as a run -----------------------------------------------------------------------------------------


def test_the_export_teaches_the_next_run(averaged, data, tmp_path, ranks):
    values = recipe_of(
        data,
        tmp_path,
        backbone=VIT,
        mix={"mixup": 0.8},
        average={"name": "ema", "decay": 0.8},
        task={"name": "distill", "teacher": str(averaged[0]), "losses": {"soft_targets": {"temperature": 2.0}}},
    )
    (code, said), _ = ranks(2).run(finetune, values)
    assert code == DONE and "top-1" in said
    assert load_classifier(tmp_path / "run" / "export").backbone.config.name == VIT["name"]
    assert (tmp_path / "run" / "predictions.npz").is_file()


def write_answers(rank: int, world: int, recipe: str, out: str) -> int:
    from finetune.teacher import main as teacher

    with contextlib.redirect_stdout(io.StringIO()):
        return teacher([recipe, "--out", out, "--verify", "4"])


def series_of(folder: Path, name: str) -> list[float]:
    found = [line["metrics"] for line in journal(folder) if "metrics" in line]
    return [metrics[name] for metrics in found if name in metrics]


def test_a_cached_teacher_teaches_what_it_does_online(averaged, data, tmp_path, ranks):
    values = recipe_of(
        data,
        tmp_path,
        backbone=VIT,
        task={
            "name": "distill",
            "teacher": str(averaged[0]),
            "labels": 0.5,
            "losses": {"soft_targets": {"temperature": 4.0}, "decoupled": {}, "dist": {}},
        },
        tracking={"enabled": False, "every": "1 steps"},
    )
    values["data"]["pool"] = 2
    values["duration"] = "12 steps"  # three epochs, so that views come again
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    answers = str(tmp_path / "answers")
    assert ranks(1).run(write_answers, str(tmp_path / "recipe.yaml"), answers) == [DONE]
    for name, cache in (("online", None), ("cached", answers)):
        run = {**values, "name": name, "task": {**values["task"], "cache": cache}}
        assert ranks(2).run(finetune, run)[0][0] == DONE
    for metric in ("train/loss", "train/loss_soft_targets", "train/loss_decoupled", "train/loss_dist"):
        online, cached = (series_of(tmp_path / name, metric) for name in ("online", "cached"))
        assert len(online) == 12 and cached == pytest.approx(online, rel=1e-3, abs=1e-3)
    other = {**values, "name": "other", "augment": {"name": "crop_flip", "size": 24}}
    (words,) = ranks(1).run(refusal, {**other, "task": {**values["task"], "cache": answers}})
    assert "augment.size: 32.0 instead of 24.0" in str(words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mix": {"mixup": 0.8}}, r"mix\.mixup"),
        ({"losses": {"features": {}}}, r"task\.losses\.features: it compares features"),
        ({"losses": {"attention": {}}}, r"task\.losses\.attention: it compares features"),
        ({"losses": {"relational": {}}}, r"task\.losses\.relational"),
        ({"pool": None}, r"data\.pool"),
    ],
)
def test_what_a_cache_cannot_say_is_refused_by_the_check(data, tmp_path, changes, words):
    losses = changes.get("losses", {"soft_targets": {}})
    task = {"name": "distill", "teacher": str(tmp_path), "cache": str(tmp_path), "losses": losses}
    values = recipe_of(data, tmp_path, backbone=VIT, task=task, mix=changes.get("mix", {}))
    values["data"]["pool"] = changes.get("pool", 2)
    with pytest.raises(InputError, match=words):
        check(Finetune, Source(values=values))


def test_relations_of_logits_can_come_from_a_cache(data, tmp_path):
    losses = {"relational": {"on": "logits"}}
    task = {"name": "distill", "teacher": str(tmp_path), "cache": str(tmp_path), "losses": losses}
    values = recipe_of(data, tmp_path, backbone=VIT, task=task)
    values["data"]["pool"] = 2
    assert check(Finetune, Source(values=values)).task.losses.relational.on == "logits"


def test_a_larger_student_and_a_smoothed_teacher_are_warned_about(data, tmp_path, ranks, caplog):
    from finetune.run import Finetuning
    from penstock.schedule import Clock
    from penstock.streams.data import Data

    values = recipe_of(data, tmp_path, backbone=VIT, loss={"smoothing": 0.1}, name="smoothed")
    assert ranks(2).run(finetune, values)[0][0] == DONE
    larger = {**VIT, "options": {**VIT["options"], "embed_dim": 48}}
    task = {"name": "distill", "teacher": str(tmp_path / "smoothed")}
    recipe = check(Finetune, Source(values=recipe_of(data, tmp_path, backbone=larger, task=task)))
    Finetuning(recipe).task(Data(recipe.data), Clock(6, 16, 64))
    assert "learned from labels smoothed by 0.1" in caplog.text
    assert "distillation is meant for a smaller student" in caplog.text
