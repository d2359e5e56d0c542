"""`penstock predict` gives what evaluation gives, whatever holds the network and the images."""

import csv
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
from PIL import Image

from penstock import export
from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.export import load_classifier
from penstock.formats.load import open_model
from penstock.formats.pictures import Picture, pictures
from penstock.formats.predict import Prediction, predictions
from penstock.formats.write import export_forms
from penstock.streams.sets.manifest import Manifest
from tests.exports import CLASSES, TEMPERATURE, VIT, coloured, write_classifier
from tests.shards import damage, key_of, pixels_of, png, write_set
from tests.unit.test_export import made

IMAGES = 23


def image_of(number: int) -> bytes:
    """Of differing shapes, tall and wide, and of differing colours."""
    height, width = 18 + number % 7, 30 - number % 5
    return png(coloured(number, height, width))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a `run` that holds an export in all forms, another run `grey`, a packed set and image files."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("predict")
    write_classifier(folder / "run" / "export", {**VIT, "size": 16})
    write_classifier(folder / "grey" / "export", {**VIT, "size": 16, "channels": 1, "mean": (0.4,)})
    export_forms(folder / "run" / "export", folder / "run" / "export", ["torch", "onnx"])
    manifest = write_set(folder / "set", [14, 9], image_of, lambda number: number % 5)
    replace(manifest, classes=CLASSES).save(folder / "set")
    (folder / "files" / "deeper").mkdir(parents=True)
    for number in range(IMAGES):
        where = folder / "files" / ("deeper" if number % 2 else "") / f"{key_of(number)}.png"
        where.write_bytes(image_of(number))
    (folder / "files" / "notes.txt").write_text("no image")
    (folder / "files" / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def told(place, capsys) -> Callable[..., dict[str, Any]]:
    def run(*words: str) -> dict[str, Any]:
        code = main(["predict", *words, "--format", "json"])
        captured = capsys.readouterr()
        assert code == DONE, captured.err
        return json.loads(captured.out, parse_constant=pytest.fail)

    return run


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert main(["predict", *words]) == INPUT_WRONG
        said = capsys.readouterr()
        assert said.err.startswith("penstock: ") and "Traceback" not in said.err and not said.out
        return " ".join(said.err.split())

    return run


def evaluated(place: Path, run: str, capsys: Any, *words: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels that `penstock evaluate` keeps."""
    kept = place / "kept.npz"
    command = ["evaluate", str(place / run), str(place / "set"), "--workers", "0", "--predictions", str(kept), *words]
    assert main([*command, "--format", "json"]) == DONE
    capsys.readouterr()
    with np.load(kept, allow_pickle=False) as found:
        return found["logits"], found["labels"]


@pytest.mark.parametrize("model", ["run", "run/export", "run/export/model.pt2", "run/export/model.onnx", "grey"])
def test_a_packed_set_as_in_evaluation(model, place, told, capsys):
    run = model.split("/")[0]
    logits, labels = evaluated(place, run, capsys)
    exponents = np.exp(logits.astype(np.float64) / TEMPERATURE)
    shares = exponents / exponents.sum(1, keepdims=True)
    found = told(str(place / model), str(place / "set"), "--top", "9", "--batch", "4")
    assert found["unreadable"] == [] and len(found["images"]) == len(labels) == IMAGES
    order = np.argsort(-logits, axis=1, kind="stable")
    for number, each in enumerate(found["images"]):
        assert each["image"] == f"{place / 'set'}/{key_of(number)}"
        best = each["predictions"]
        assert [one["label"] for one in best] == order[number].tolist()  # exactly
        assert [one["class"] for one in best] == [CLASSES[label] for label in order[number]]
        np.testing.assert_allclose([one["probability"] for one in best], shares[number, order[number]], atol=2e-5)
        assert sum(one["probability"] for one in best) == pytest.approx(1)
    assert len({each["predictions"][0]["label"] for each in found["images"]}) > 1
    answers = predictions(open_model(place / model), pictures([place / "set"], 1 if run == "grey" else 3))
    got = torch.stack([each.logits for each in answers if isinstance(each, Prediction)])
    np.testing.assert_allclose(got.numpy(), logits, rtol=1e-4, atol=1e-4)


def test_files_and_folders_are_the_set(place, told):
    packed = told(str(place / "run"), str(place / "set"))
    by_key = {Path(each["image"]).name: each["predictions"] for each in packed["images"]}
    folder = told(str(place / "run"), str(place / "files"))
    assert {Path(each["image"]).stem for each in folder["images"]} == set(by_key)
    assert [each["image"] for each in folder["images"]] == sorted(each["image"] for each in folder["images"])
    for each in folder["images"]:
        for got, want in zip(each["predictions"], by_key[Path(each["image"]).stem], strict=True):
            assert got["label"] == want["label"]
            assert got["probability"] == pytest.approx(want["probability"], abs=1e-6)
    two = [str(place / "files" / f"{key_of(number)}.png") for number in (4, 2)]
    several = told(str(place / "run"), *two, str(place / "set"), "--top", "1")["images"]
    assert [each["image"] for each in several[:2]] == two and len(several) == IMAGES + 2
    assert all(len(each["predictions"]) == 1 for each in several)


def test_another_size(place, told, refused, capsys):
    logits, _ = evaluated(place, "run", capsys, "--size", "24")
    found = told(str(place / "run"), str(place / "set"), "--size", "24")["images"]
    assert [each["predictions"][0]["label"] for each in found] == logits.argmax(1).tolist()
    for form in ("pt2", "onnx"):
        said = refused(str(place / "run" / "export" / f"model.{form}"), str(place / "set"), "--size", "24")
        assert "--size 24" in said and "takes images of 16 x 16 alone" in said
    assert "--size 13" in refused(str(place / "run"), str(place / "set"), "--size", "13")


def test_what_cannot_be_read_is_listed(place, told, refused, tmp_path, capsys):
    shutil.copytree(place / "set", tmp_path / "set")
    key = damage(Manifest.load(tmp_path / "set"), 3)
    cut = tmp_path / "cut.png"
    cut.write_bytes(image_of(1)[:-60])
    found = told(str(place / "run"), str(tmp_path / "set"), str(cut), "--batch", "2")
    assert [Path(each["image"]).name for each in found["unreadable"]] == [key, "cut.png"]
    assert all(each["reason"] for each in found["unreadable"]) and len(found["images"]) == IMAGES - 1
    whole = {
        each["image"].split("/")[-1]: each["predictions"]
        for each in told(str(place / "run"), str(place / "set"))["images"]
    }
    for each in found["images"]:  # the others are not moved to another image's place
        want = whole[each["image"].split("/")[-1]]
        assert [one["label"] for one in each["predictions"]] == [one["label"] for one in want]

    said = refused(str(place / "run"), str(cut))
    assert "none of the 1 images can be read" in said and str(cut) in said
    assert "does not exist" in refused(str(place / "run"), str(tmp_path / "none.png"))
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(str(place / "run"), str(tmp_path / "empty"))
    for form in ("table", "json", "csv"):
        assert main(["predict", str(place / "run"), str(cut), str(place / "set"), "--format", form]) == DONE
        captured = capsys.readouterr()
        assert f"cannot be read: {cut}" in captured.err and (str(cut) in captured.out) == (form == "json")


def test_table_csv_and_sheet(place, told, tmp_path, capsys):
    found = told(str(place / "run"), str(place / "set"), "--top", "2")["images"]
    sheet = tmp_path / "sheet.png"
    command = ["predict", str(place / "run"), str(place / "set"), "--top", "2"]
    assert main([*command, "--format", "csv", "--sheet", str(sheet)]) == DONE
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    want = [(each["image"], one["class"], one["label"]) for each in found for one in each["predictions"]]
    assert [(row["image"], row["class"], int(row["label"])) for row in rows] == want
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "1", "2"]
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and len(picture.convert("L").getcolors(256) or []) > 100
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]

    assert main(["predict", str(place / "run"), str(place / "files" / f"{key_of(0)}.png")]) == DONE
    shown = capsys.readouterr().out
    first = told(str(place / "run"), str(place / "files" / f"{key_of(0)}.png"))["images"][0]["predictions"][0]
    line = next(line for line in shown.splitlines() if f" {100 * first['probability']:.1f} %" in line)
    assert first["class"] in line and "█" in line


def test_models_that_have_no_label_to_tell(place, refused, tmp_path):
    backbone = made({**VIT, "size": 16})
    folder = export.export_backbone(backbone.state_dict(), backbone.config, tmp_path / "backbone")
    assert "is a backbone alone: it gives features and has no classes" in refused(str(folder), str(place / "set"))
    assert "is no export and holds none" in refused(str(place), str(place / "set"))
    (tmp_path / "model.onnx").write_bytes((place / "run" / "export" / "model.onnx").read_bytes()[:500])
    assert "is damaged" in refused(str(tmp_path / "model.onnx"), str(place / "set"))
    assert "make it first" in refused(str(place / "run"), str(place / "set"), "--sheet", str(tmp_path / "no" / "a.png"))
    write_classifier(tmp_path / "wide", {**VIT, "size": (16, 24)})
    assert "takes images of 16 x 24" in refused(str(tmp_path / "wide"), str(place / "set"))
    with pytest.raises(InputError, match="not finite"):
        model = open_model(place / "run")
        broken = replace(model, answers=lambda images: torch.full((len(images), 5), torch.nan))
        list(predictions(broken, [Picture("a", pixels_of(1, 20, 20))]))


def test_the_views_are_those_of_evaluation(place):
    """The pixels that the network is shown, against the stream that evaluation reads."""
    from penstock.evaluate._classifier import prepared
    from penstock.streams.evaluation import EvalStream
    from penstock.streams.images import Images

    classifier = load_classifier(place / "grey" / "export")
    augment = prepared(classifier, None, None)
    stream = EvalStream(Images(Manifest.load(place / "set"), channels=1), augment, batch=IMAGES)
    views = next(iter(stream)).views[0]
    found = predictions(open_model(place / "grey"), pictures([place / "files" / "deeper", place / "set"], 1))
    mine = [each.view for each in found if isinstance(each, Prediction)]
    assert torch.equal(torch.stack(mine[-IMAGES:]), views)
    assert torch.equal(torch.stack(mine[:-IMAGES]), views[1::2])
