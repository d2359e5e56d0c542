"""Exports of classifiers: timm opens them with the same logits, and what timm has no place for is kept beside."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penstock import export
from penstock.backbones import Backbone
from penstock.errors import InputError
from penstock.head import Head
from tests.unit.test_export import VIT, made

CLASSES = ("ant", "bee", "cow", "dog", "eel")
SMALL = {**VIT, "size": 32}


def exported(folder: Path, fields: dict[str, Any], **head: Any) -> tuple[Path, Backbone, Head]:
    backbone = made(fields)
    module = Head(Head.Config(**head), backbone.dim, len(CLASSES), backbone).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    module.drop.p = 0.3
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in module.state_dict().items()}
    about, prepared = {"run": "a"}, {"crop_pct": 0.9, "interpolation": "bicubic"}
    export.export_classifier(state, backbone.config, module.config, folder, CLASSES, about, prepared, 1.5)
    return folder, backbone, module


@pytest.mark.parametrize(
    ("fields", "norm"),
    [
        (SMALL, "batch"),
        ({**SMALL, "size": (32, 24), "pool": "avg", "channels": 1, "mean": (0.3,)}, "none"),
        ({**SMALL, "pool": "avg", "options": {**VIT["options"], "fc_norm": True}}, "none"),  # type: ignore[dict-item]
        ({"name": "resnet18", "size": 64}, "none"),
        ({"name": "convnext_atto", "size": 64}, "batch"),
        ({"name": "mobilenetv3_small_050", "size": 64}, "none"),
    ],
)
def test_timm_gives_the_same_logits(fields: dict[str, Any], norm: str, tmp_path: Path) -> None:
    import timm

    folder, backbone, head = exported(tmp_path / "out", fields, norm=norm)
    fresh: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = export.load_classifier(folder)
    images = torch.randint(0, 256, (2, backbone.config.channels, *backbone.size), dtype=torch.uint8)
    with torch.no_grad():
        normal = backbone.normalize(images).double()
        want = head.double()(backbone.double()(normal))
        torch.testing.assert_close(fresh.double()(normal).float(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(images), want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.probabilities(images), (ours(images) / 1.5).softmax(-1))
        # A backbone to start from is in it, too.
        again = export.load_export(folder).eval()
        assert all(torch.equal(v.double(), backbone.state_dict()[n].double()) for n, v in again.state_dict().items())
    assert ours.classes == CLASSES and ours.temperature == 1.5 and not ours.training
    config = fresh.pretrained_cfg
    assert list(config["label_names"]) == list(CLASSES) and config["num_classes"] == len(CLASSES)
    data = timm.data.resolve_model_data_config(fresh)
    assert data["crop_pct"] == 0.9 and data["interpolation"] == "bicubic"
    assert data["mean"] == pytest.approx(tuple(backbone.mean.tolist())) and data["input_size"][1:] == backbone.size
    assert json.loads((folder / "config.json").read_text())["penstock"]["run"] == "a"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("head", [{"kind": "attentive", "heads": 4}, {"norm": "layer"}])
def test_a_head_of_our_own_is_kept_beside(head: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    import timm

    folder, backbone, module = exported(tmp_path / "out", SMALL, **head)
    assert "timm opens the backbone alone" in caplog.text
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        want = module(backbone(images))
        torch.testing.assert_close(export.load_classifier(folder)(images), want)
        fresh: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        want = backbone(images).pooled
        torch.testing.assert_close(fresh(backbone.normalize(images)), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(export.load_export(folder).eval()(images).pooled, want)
    (folder / export.HEAD_FILE).write_bytes(b"")
    with pytest.raises(InputError, match=r"head.safetensors is damaged"):
        export.load_classifier(folder)


def test_a_network_whose_classifier_is_not_one_linear_layer(tmp_path: Path) -> None:
    folder, backbone, head = exported(tmp_path / "out", {"name": "levit_128s", "size": 224})
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    assert (folder / export.HEAD_FILE).is_file()
    with torch.no_grad():
        torch.testing.assert_close(export.load_classifier(folder)(images), head(backbone(images)))


def test_an_export_without_a_classifier_is_refused(tmp_path: Path) -> None:
    backbone = made(SMALL)
    folder = export.export_backbone(backbone.state_dict(), backbone.config, tmp_path / "out")
    with pytest.raises(InputError, match="export of a backbone, without a classifier"):
        export.load_classifier(folder)


def test_a_classifier_starts_the_next_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As backbone.weights: its backbone is loaded whole, its classifier left out and named."""
    folder, backbone, _ = exported(tmp_path / "out", SMALL)
    caplog.set_level("INFO")
    again = Backbone(Backbone.Config(**SMALL, weights=str(folder)))
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.loaded is not None and not again.loaded.missing and not again.loaded.unexpected
    assert again.loaded.beside == ("head.bias", "head.weight")
    assert "left out head.bias, head.weight: a decoder or classifier" in caplog.text
