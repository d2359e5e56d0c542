"""Exports: timm opens them with the same outputs, and a damaged one is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import export
from penstock.backbones import Backbone
from penstock.errors import InputError
from pretrain.methods.mae import MAE

VIT = {"name": "vit_tiny_patch16_224", "options": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}}


def made(fields: dict[str, Any]) -> Backbone:
    backbone = Backbone(Backbone.Config(**fields))
    for parameter in backbone.parameters():  # no constant that a fresh model has as well
        torch.nn.init.normal_(parameter, std=0.2)
    for buffer in backbone.model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return backbone.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {**VIT, "size": 32},
        {**VIT, "size": (32, 24), "channels": 1, "pool": "avg", "mean": (0.3,)},
        {**VIT, "size": 32, "pool": "token", "options": {**VIT["options"], "drop_path_rate": 0.1}},  # type: ignore[dict-item]
        {"name": "resnet18", "size": 64},
        {"name": "convnext_atto", "size": 64, "channels": 2},
        {"name": "mobilenetv3_small_050", "size": 64},
    ],
)
def test_timm_opens_an_export(fields: dict[str, Any], tmp_path: Path) -> None:
    import timm

    backbone = made(fields)
    state = torch.get_rng_state()
    folder = export.export_backbone(
        backbone.state_dict(), backbone.config, tmp_path / "out", {"run": "a", "recipe": "b"}
    )
    assert torch.equal(state, torch.get_rng_state())  # an export in the middle of a run must not change the run
    images = torch.randn(2, backbone.config.channels, *backbone.size, dtype=torch.float64)
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    loaded = export.load_export(folder).eval()
    with torch.no_grad():
        # In double precision: how attention is computed (fused or not) moves fp32 outputs by about 1e-6.
        backbone, fresh, loaded = backbone.double(), fresh.double(), loaded.double()
        expected = backbone(images)
        torch.testing.assert_close(fresh(images), expected.pooled, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loaded(images).pooled, expected.pooled, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loaded(images).spatial, expected.spatial, rtol=1e-6, atol=1e-6)
    data = timm.data.resolve_model_data_config(fresh)
    assert data["mean"] == pytest.approx(tuple(backbone.mean.tolist())) and data["input_size"][1:] == backbone.size
    about = json.loads((folder / "config.json").read_text())["penstock"]
    assert about["run"] == "a" and about["recipe"] == "b"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_call_in_the_config_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    backbone = made({**VIT, "size": 32})
    export.export_backbone(backbone.state_dict(), backbone.config, tmp_path / "out")
    call = json.loads((tmp_path / "out" / "config.json").read_text())["penstock"]["create"]
    assert call.split("  #")[0] == "timm.create_model('local-dir:out', pretrained=True)"
    monkeypatch.chdir(tmp_path)
    assert timm.create_model("local-dir:out", pretrained=True).num_features == 48


def test_an_export_of_mae_holds_the_fixed_positions(tmp_path: Path) -> None:
    import timm

    task = MAE(
        MAE.Config(decoder_dim=32, decoder_depth=1, decoder_heads=4), Backbone(Backbone.Config(**VIT, size=32)), 0
    )
    task.eval()
    folder = export.export_backbone(task.backbone.state_dict(), task.backbone.config, tmp_path / "out")
    fresh = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(fresh.pos_embed, task.backbone.model.pos_embed)
    images = torch.randn(2, 3, 48, 32, dtype=torch.float64)  # another size, too
    with torch.no_grad():
        expected = task.backbone.double()(images).pooled
        torch.testing.assert_close(fresh.double()(images), expected, rtol=1e-6, atol=1e-6)
    task.float()
    # Pretraining may go on from it: weights and positions are kept.
    again = MAE(task.config, export.load_export(folder), 1)
    for name, value in task.backbone.state_dict().items():
        assert torch.equal(again.backbone.state_dict()[name], value), name


def test_a_new_export_replaces_the_old_one_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made({**VIT, "size": 32}), made({**VIT, "size": 32})
    folder = tmp_path / "out"
    export.export_backbone(first.state_dict(), first.config, folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "_digest", full)
        with pytest.raises(OSError, match="No space"):
            export.export_backbone(second.state_dict(), second.config, folder)
    assert torch.equal(export.load_export(folder).model.cls_token, first.model.cls_token)
    export.export_backbone(second.state_dict(), second.config, folder)
    assert torch.equal(export.load_export(folder).model.cls_token, second.model.cls_token)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_weights_of_another_model_are_not_exported(tmp_path: Path) -> None:
    state = made({**VIT, "size": 32}).state_dict()
    with pytest.raises(ValueError, match="not the state of resnet18"):
        export.export_backbone(state, Backbone.Config(name="resnet18"), tmp_path / "out")
    state["model.cls_token"] = state["model.cls_token"][..., :0]  # a shard of it, as ZeRO 3 leaves them
    with pytest.raises(ValueError, match="cls_token"):
        export.export_backbone(state, Backbone.Config(**VIT, size=32), tmp_path / "out")


def test_damaged_exports_are_refused(tmp_path: Path) -> None:
    backbone = made({**VIT, "size": 32})
    folder = export.export_backbone(backbone.state_dict(), backbone.config, tmp_path / "out")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        export.load_export(folder)
    weights.unlink()
    with pytest.raises(InputError, match="has no model"):
        export.load_export(folder)
    weights.touch()
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not describe a Penstock export"):
        export.load_export(folder)
    with pytest.raises(InputError, match="is not an export"):
        export.load_export(tmp_path)
