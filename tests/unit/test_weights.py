"""Files of weights as others publish them, and the report of what became of every tensor."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.backbones import Backbone
from penstock.backbones.weights import grouped
from penstock.errors import InputError
from tests.unit.test_export import VIT

SMALL: dict[str, Any] = {**VIT, "size": 32, "options": {**VIT["options"], "depth": 4}}  # type: ignore[dict-item]
State = dict[str, Tensor]


def fresh(fields: dict[str, Any] = SMALL, seed: int = 1, **more: Any) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(Backbone.Config(**{**fields, **more}))


def random_state(fields: dict[str, Any] = SMALL, seed: int = 1) -> State:
    """Values that differ from one seed to another, and from a fresh model's."""
    state = fresh(fields, seed).model.state_dict()
    return {name: torch.rand_like(value.float()).to(value.dtype) for name, value in state.items()}


def others() -> State:
    return random_state(seed=7)


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def loaded(file: Path, content: Any, fields: dict[str, Any] = SMALL, **more: Any) -> Backbone:
    torch.save(content, file)
    return fresh(fields, 2, weights=str(file), **more)


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [
        (lambda state: state, ""),
        (lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, "model"),
        (lambda state: {"model": others(), "model_ema": state}, "model_ema"),
        (lambda state: {"state_dict": prefixed("module.", state)}, "state_dict.module"),
        (lambda state: prefixed("_orig_mod.backbone.", state), "_orig_mod.backbone"),
        # MoCo v3: two encoders side by side, and a projector where the classifier was.
        (
            lambda state: {
                "state_dict": prefixed("module.momentum_encoder.", others())
                | prefixed("module.base_encoder.", state | {"head.0.weight": torch.zeros(4, 48)})
            },
            "state_dict.module.base_encoder",
        ),
        # DINO: a student and a teacher, with their heads.
        (
            lambda state: {
                "student": prefixed("module.backbone.", others()),
                "teacher": prefixed("backbone.", state) | {"head.mlp.0.weight": torch.zeros(4, 48)},
                "args": argparse.Namespace(arch="vit"),
            },
            "teacher.backbone",
        ),
    ],
)
def test_published_layouts(wrap: Any, inside: str, tmp_path: Path) -> None:
    state = random_state()
    backbone = loaded(tmp_path / "file.pth", wrap(state))
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    report = backbone.loaded
    assert report is not None and report.inside == inside
    assert report.loaded == report.total == len(state) and not report.missing and not report.unexpected


def test_dinov2_with_registers_and_layer_scale(tmp_path: Path) -> None:
    """Facebook's names: register tokens beside the class token, whose position is part of the position embedding."""
    options = {**SMALL["options"], "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    fields = {**SMALL, "options": options}
    state = random_state(fields)
    theirs = dict(state)
    theirs["register_tokens"] = theirs.pop("reg_token")
    position = torch.randn(1, 1, 48)
    theirs["pos_embed"] = torch.cat([position, theirs["pos_embed"]], 1)
    theirs["cls_token"] = state["cls_token"] - position
    theirs["mask_token"] = torch.zeros(1, 48)
    backbone = loaded(tmp_path / "dinov2.pth", theirs, fields)
    for name, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)
    # Without registers the names are timm's already, and only the token of masked patches is left over.
    fields = {**SMALL, "options": {**SMALL["options"], "init_values": 1e-5}}
    backbone = loaded(tmp_path / "plain.pth", {**random_state(fields), "mask_token": torch.zeros(1, 48)}, fields)
    assert backbone.loaded is not None and backbone.loaded.beside == ("mask_token",)


def test_convnext_under_its_authors_names(tmp_path: Path) -> None:
    fields = {"name": "convnext_atto", "size": 32}
    state = random_state(fields)
    theirs = {}
    for name, value in state.items():
        new = name.replace("stem.0", "downsample_layers.0.0").replace("stem.1", "downsample_layers.0.1")
        for stage in range(1, 4):
            new = new.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
        new = new.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        theirs[new.replace("head.norm", "norm")] = value
    assert theirs.keys() != state.keys()
    backbone = loaded(tmp_path / "convnext.pth", {"model": theirs}, fields)
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_mae_encoder_in_a_model_with_fc_norm(tmp_path: Path) -> None:
    """Finetuning MAE drops the last norm and starts a new one behind the pooling: reported, and no error."""
    state = random_state() | {"mask_token": torch.zeros(1, 1, 8), "decoder_pred.weight": torch.zeros(3, 8)}
    options = {**SMALL["options"], "fc_norm": True}
    backbone = loaded(tmp_path / "mae.pth", {"model": state}, {**SMALL, "pool": "avg", "options": options})
    report = backbone.loaded
    assert report is not None
    assert report.missing == ("fc_norm.bias", "fc_norm.weight") and report.unexpected == ("norm.bias", "norm.weight")
    assert set(report.beside) == {"mask_token", "decoder_pred.weight"}
    assert torch.equal(backbone.model.fc_norm.weight, torch.ones(48))
    said = str(report).splitlines()
    assert said[0].endswith(f"mae.pth (model): {report.loaded} of {report.total} tensors loaded")
    assert "lacks fc_norm.bias, fc_norm.weight, which keep their initial values" in said[1]
    assert "no place for norm.bias, norm.weight" in said[2] and len(said) == 4


def test_the_report_groups_layers_and_names_what_was_resampled(tmp_path: Path) -> None:
    options = {**SMALL["options"], "init_values": 1e-5}
    state = random_state({**SMALL, "options": options})
    backbone = loaded(tmp_path / "file.pth", state, SMALL, size=48)
    said = str(backbone.loaded)
    assert "no place for blocks.*.ls1.gamma (4), blocks.*.ls2.gamma (4)" in said
    assert "resampled pos_embed from 4 x 4 to 6 x 6 patches" in said
    assert grouped(["a.0.b", "a.10.b", "c2"]) == "a.*.b (2), c2"
    assert grouped([f"x{letter}" for letter in "abcdefghij"]).endswith("xh and 2 more")


def test_too_few_matches_are_refused_unless_the_recipe_allows_it(tmp_path: Path) -> None:
    """A file that lacks a block has 89 % of the tensors; the message says which are missing, and what to set."""
    state = {name: value for name, value in random_state().items() if not name.startswith("blocks.3.")}
    total = len(random_state())
    share = len(state) / total
    with pytest.raises(
        InputError, match=rf"12 of {total} tensors are missing \(blocks.\*.attn.proj.bias, .*below {share:.2f}"
    ):
        loaded(tmp_path / "file.pth", state)
    backbone = loaded(tmp_path / "file.pth", state, match=share - 0.01)
    assert backbone.loaded is not None and len(backbone.loaded.missing) == 12
    with pytest.raises(InputError, match="does not hold weights of this backbone"):
        loaded(tmp_path / "other.pth", {"conv1.weight": torch.zeros(3)}, match=0.0)


def test_weights_of_another_normalization_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from penstock.export import export_backbone

    fields: dict[str, Any] = {**VIT, "size": 32, "mean": (0.5,), "std": (0.25,)}
    trained = Backbone(Backbone.Config(**fields))
    folder = export_backbone(trained.state_dict(), trained.config, tmp_path / "export")
    Backbone(Backbone.Config(**fields, weights=str(folder)))
    assert "backbone.mean" not in caplog.text and "backbone.std" not in caplog.text
    Backbone(Backbone.Config(**{**fields, "std": (0.2,)}, weights=str(folder)))
    assert "set backbone.std='[0.25, 0.25, 0.25]'" in caplog.text and "backbone.mean" not in caplog.text
