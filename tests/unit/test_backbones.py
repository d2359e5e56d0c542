"""Backbones: names, forms of features, weights from files."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from penstock import distributed
from penstock.backbones import Backbone, names
from penstock.backbones.attention import choose_attention
from penstock.errors import InputError

TINY_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
PLAIN = "vit_tiny_patch16_224"


def vit(size: Any = 32, options: dict | None = None, **fields: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(Backbone.Config(name=PLAIN, size=size, options={**TINY_VIT, **(options or {})}, **fields)).eval()


# Names


def test_names_are_those_timm_registers() -> None:
    import timm

    assert names.timm_names() == sorted(timm.list_models())


def test_names_need_neither_torch_nor_timm() -> None:
    check = "import sys; from penstock.backbones.names import facts; facts('resnet18')"
    code = check + "; print(*{'torch', 'timm'} & {*sys.modules})"
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == ""


def test_facts() -> None:
    assert names.patch_of("vit_base_patch14_dinov2.lvd142m", {}) == (14, 14)
    assert names.patch_of("vit_base_patch16_224", {"patch_size": 4}) == (4, 4)
    assert names.patch_of("vit_base_patch16_224", {"patch_size": [4, 6]}) == (4, 6)
    assert names.patch_of("resnet50", {}) is None
    assert (
        names.is_vit("vit_base_patch16_224")
        and not names.is_vit("resnet50")
        and not names.is_vit("beit_base_patch16_224")
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "vit_bsae_patch16_224"}, "did you mean 'vit_base_patch16_224'"),
        ({"name": PLAIN, "size": 30}, r"does not divide the size 30 x 30; \[32, 32\] would do"),
        ({"name": PLAIN, "size": (32, 20), "options": {"patch_size": 8}}, r"\[32, 16\] would do"),
        ({"name": PLAIN, "options": {"img_size": 32}}, "backbone.size"),
        ({"name": PLAIN, "options": {"num_classes": 10}}, "always set"),
        ({"name": PLAIN, "channels": 2, "mean": (0.5, 0.5, 0.4)}, "mean: 3 values for 2 channels"),
        ({"name": PLAIN, "std": (0.0,)}, "above 0"),
        ({"name": PLAIN, "patch": 8}, "Extra inputs"),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Backbone.Config(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "resnet18", "options": {"depht": 3}}, "depht"),
        ({"name": "resnet18", "pool": "token", "size": 32}, "pool='token' does not fit resnet18"),
        ({"name": PLAIN, "options": {"num_heads": 5}}, "num_heads"),
        ({"name": "crossvit_9_240", "size": 240}, "one feature map or one sequence"),
    ],
)  # fmt: skip
def test_what_timm_refuses_is_explained(fields: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Backbone(Backbone.Config(**fields))


# Features


@pytest.mark.parametrize(
    ("name", "size", "options", "kind", "spatial"),
    [
        (PLAIN, (32, 24), TINY_VIT, "tokens", (12, 48)),
        ("vit_small_patch14_reg4_dinov2", 28, {"embed_dim": 48, "num_heads": 3, "depth": 1}, "tokens", (4, 48)),
        ("eva02_tiny_patch14_224", 28, {"depth": 1}, "tokens", (4, 192)),
        ("resnet18", 64, {}, "map", (512, 2, 2)),
        ("convnext_atto", 64, {}, "map", (320, 2, 2)),
        ("mobilenetv3_small_050", 64, {}, "map", (288, 2, 2)),
        ("swin_tiny_patch4_window7_224", 224, {"depths": (1, 1, 1, 1), "embed_dim": 24}, "map", (192, 7, 7)),
    ],
)  # fmt: skip
def test_features(name: str, size: Any, options: dict, kind: str, spatial: tuple) -> None:
    backbone = Backbone(Backbone.Config(name=name, size=size, options=options))
    assert backbone.training
    features = backbone(torch.randint(0, 256, (2, 3, *backbone.size), dtype=torch.uint8))
    assert backbone.kind == kind
    assert features.pooled.shape == (2, backbone.dim)
    assert features.spatial.shape == (2, *spatial)
    if kind == "map" and name.startswith("resnet"):
        torch.testing.assert_close(features.pooled, features.spatial.mean((2, 3)))


def test_construction_leaves_statistics_alone() -> None:
    backbone = Backbone(Backbone.Config(name="resnet18", size=32))
    assert backbone.model.bn1.num_batches_tracked == 0 and backbone.model.bn1.running_mean.abs().max() == 0


def test_pooling() -> None:
    images = torch.randn(2, 3, 32, 32)
    token, average, default = vit(pool="token"), vit(pool="avg"), vit()
    for backbone in (average, default):
        backbone.load_state_dict(token.state_dict())  # pooling changes no name of a weight
    features = average(images)
    torch.testing.assert_close(features.pooled, features.spatial.mean(1))
    torch.testing.assert_close(token(images).pooled, token.model.forward_features(images)[:, 0])
    assert torch.equal(default(images).pooled, token(images).pooled)


def test_vits_take_other_sizes() -> None:
    backbone = vit()
    assert backbone(torch.randn(2, 3, 48, 16)).spatial.shape == (2, 12, 48)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_normalisation(channels: int) -> None:
    images = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    backbone = vit(channels=channels)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    if channels != 3:
        mean, std = mean.mean().repeat(channels), std.mean().repeat(channels)
    expected = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    found = backbone.normalize(images)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone(images).pooled, backbone(expected.float()).pooled, rtol=1e-4, atol=1e-4)
    assert not {"mean", "std"} & backbone.state_dict().keys()


# Weights from files


def published_mae(size: int = 32, channels: int = 3) -> dict[str, Any]:
    """A file as the authors of MAE publish them: encoder and decoder under 'model', in the reference's names."""
    state = dict(vit(size, channels=channels).model.state_dict())
    state = {name: torch.randn_like(value) for name, value in state.items()}
    decoder = (
        "mask_token",
        "decoder_pos_embed",
        "decoder_embed.weight",
        "decoder_blocks.0.norm1.bias",
        "decoder_pred.bias",
    )
    return {"model": {**state, **{name: torch.randn(1, 4) for name in decoder}}}


def test_published_mae_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, saved = tmp_path / "mae_pretrain.pth", published_mae()
    torch.save(saved, file)
    with caplog.at_level(logging.INFO):
        backbone = vit(weights=str(file))
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, saved["model"][name])
    assert "left out mask_token, decoder_" in caplog.text and "lacks" not in caplog.text


def test_positions_of_another_size_are_resampled(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    file, saved = tmp_path / "mae.pth", published_mae()
    torch.save(saved, file)
    found = vit((48, 32), weights=str(file)).model.pos_embed
    expected = resample_abs_pos_embed(saved["model"]["pos_embed"], [6, 4], [4, 4], 1)
    torch.testing.assert_close(found, expected)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, saved = tmp_path / "some.pth", published_mae()["model"]
    saved["fc_norm.weight"] = saved.pop("norm.weight")
    torch.save(saved, file)
    vit(weights=str(file))
    assert "no place for fc_norm.weight" in caplog.text and "lacks norm.weight" in caplog.text


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda file: torch.save({"model": {"conv1.weight": torch.zeros(3)}}, file), "does not hold weights of this"),
        (lambda file: torch.save(published_mae(channels=1), file), r"patch_embed.proj.weight is \[48, 1, 8, 8\]"),
        (lambda file: torch.save({"model": {"epoch": 3}}, file), "not a dictionary of tensors"),
        (lambda file: torch.save([1, 2], file), "not a dictionary of tensors"),
        (lambda file: file.write_bytes(b"no checkpoint"), "cannot be read"),
        (lambda file: file.write_bytes(pickle.dumps({"model": Bomb()})), "cannot be read"),
        (lambda file: torch.save({"model": Bomb()}, file), "cannot be read"),
        (lambda file: file.mkdir(), "holds no model.safetensors"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(
    make: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file.pth")
    with pytest.raises(InputError, match=says):
        vit(weights="file.pth")
    assert not Path("exploded").exists()


def test_a_cut_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file(vit().model.state_dict(), file)
    vit(weights=str(file))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be read"):
        vit(weights=str(file))


# Speed


@pytest.mark.parametrize(("where", "tokens", "fused"), [("cpu", 17, False), ("cpu", 2000, True), ("cuda", 17, True)])
def test_attention_on_a_cpu(where: str, tokens: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    attention, x = Attention(48, num_heads=3), torch.randn(2, 17, 48)
    expected = attention(x)
    monkeypatch.setattr(distributed, "device", lambda: torch.device(where))
    choose_attention(attention, tokens)
    assert attention.fused_attn is fused
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)
