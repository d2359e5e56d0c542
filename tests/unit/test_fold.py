"""Batch norm folded into what feeds it: the same outputs, found by tensors and not by names."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penstock.backbones import Backbone
from penstock.backbones.batchnorm import convert
from penstock.backbones.fold import FOLDED_FILE, fold_batchnorm, fold_structure, load_folded, save_folded
from penstock.errors import InputError
from penstock.export import export_backbone


def _stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics and affine parameters that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            values = [torch.rand(layer.num_features, generator=generator) + 0.5 for _ in range(4)]
            for own, value in zip(
                (layer.running_mean, layer.running_var, layer.weight, layer.bias), values, strict=True
            ):
                if own is not None:
                    own.data.copy_(value)
    return model.eval()


@pytest.mark.parametrize("ours", [False, True], ids=["timm", "ours"])
@pytest.mark.parametrize(
    ("name", "norms", "folded"),
    [
        ("resnet50", 53, 53),
        ("resnet10t", 14, 14),
        ("mobilenetv3_small_050", 34, 34),
        ("tf_efficientnet_b0", 49, 49),  # convolutions of a class of timm's own
        ("regnetx_002", 44, 44),
        ("resnetv2_18d", 19, 10),  # half of them come before a convolution
        ("convnext_atto", 0, 0),
        ("vit_tiny_patch16_224", 0, 0),
    ],
)
def test_outputs_stay_the_same(name, norms, folded, ours):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **({"img_size": 64} if name.startswith("vit") else {}))
    model = _stirred(convert(model) if ours else model)
    images, names = torch.randn(2, 3, 64, 64), list(model.state_dict())
    with torch.no_grad():
        before = model(images)
        structure = fold_batchnorm(model, images)
        assert (model(images) - before).abs().max() <= 1e-5 * before.abs().max()
    left = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert (len(structure), len(left)) == (folded, norms - folded)
    assert folded or list(model.state_dict()) == names  # nothing to fold: nothing changed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        lambda bias: nn.Conv2d(4, 6, 3, bias=bias),
        lambda bias: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=bias),
        lambda bias: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=bias),
        lambda bias: nn.Conv1d(4, 6, 3, bias=bias),
        lambda bias: nn.Conv3d(4, 6, 2, bias=bias),
        lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias),
        lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=bias),
        lambda bias: nn.ConvTranspose1d(4, 4, 3, groups=4, bias=bias),
        lambda bias: nn.Linear(4, 6, bias=bias),
    ],
)
def test_every_kind_of_layer(layer, bias, affine):
    torch.manual_seed(0)
    first = layer(bias)
    dimensions = 0 if isinstance(first, nn.Linear) else first.weight.ndim - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions]
    width = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    model = _stirred(nn.Sequential(first, nn.Identity(), norm(width, affine=affine))).double()
    x = torch.randn(3, 4, *[5] * dimensions, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        assert fold_batchnorm(model, x) == [("0", "2")]
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


class Awkward(nn.Module):
    """Every way in which a convolution and a batch norm after it may not be folded."""

    def __init__(self, case: str):
        super().__init__()
        self.case = case
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        if case.startswith("tied"):
            self.second.weight = self.first.weight

    def forward(self, x):
        if self.case == "standardised weight":
            weight = self.first.weight - self.first.weight.mean()
            return self.norm(F.conv2d(x, weight, self.first.bias))
        if self.case == "one dimension short":
            return self.norm(self.first(x[0])[None])
        made = self.first(x)
        if self.case == "read twice":
            return self.norm(made) + made
        if self.case == "two norms":
            return self.norm(made) + self.other(made)
        if self.case == "returned as well":
            return self.norm(made), made
        if self.case == "changed in place":
            return self.norm(made.relu_())
        if self.case == "convolution twice":
            return self.norm(made) + self.first(2 * x)
        if self.case == "norm twice":
            return self.norm(made) + self.norm(self.second(x))
        if self.case == "tied weights":
            return self.norm(made) + self.second(x)
        if self.case == "not next":
            return self.norm(made * 2)
        return self.norm(x if self.case == "none before" else made)


CASES = ["standardised weight", "one dimension short", "read twice", "two norms", "returned as well"]
CASES += ["changed in place", "convolution twice", "norm twice", "tied weights", "tied to one that rests"]
CASES += ["not next", "none before"]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_folded_is_left_alone(case):
    model = _stirred(Awkward(case))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert fold_batchnorm(model, torch.randn(1, 3, 4, 4)) == []
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_channels_that_are_not_the_layers_outputs_are_left_alone():
    model = _stirred(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))  # [B, 3, 3]: normalised over the tokens
    assert fold_batchnorm(model, torch.randn(2, 3, 4)) == []


def test_a_model_that_is_more_than_it_shows_is_refused():
    class Sly(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) * (2.0 if isinstance(self.norm, nn.BatchNorm2d) else 1.0)

    with pytest.raises(RuntimeError, match="folding changed the outputs"):
        fold_batchnorm(_stirred(Sly()), torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_an_export_with_folded_weights_opens_again(tmp_path, name):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    config = Backbone.Config(name=name, size=64)
    backbone = Backbone(config)
    _stirred(backbone)
    folder = export_backbone(backbone.state_dict(), config, tmp_path / "export")
    weights = backbone.model.conv1[0].weight.clone() if name == "resnet10t" else backbone.model.conv_stem.weight.clone()
    images = torch.randn(2, 3, 64, 64)
    structure = save_folded(backbone.model, folder, images[:1])
    now = backbone.model.conv1[0].weight if name == "resnet10t" else backbone.model.conv_stem.weight
    assert torch.equal(now, weights)  # the model itself stays
    assert json.loads(json.dumps(structure)) == [list(pair) for pair in structure]
    folded = load_folded(folder)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in folded.modules())
    with torch.no_grad():
        expected = backbone.model(images)
        assert (folded(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    file = folder / FOLDED_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="damaged"):
        load_folded(folder)


def test_a_folder_without_folded_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not an export"):
        load_folded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no folded weights"):
        load_folded(tmp_path)


def test_structure_alone_fits_folded_weights():
    model, twin = (_stirred(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), s) for s in (1, 2))
    x = torch.randn(2, 3, 4, 4)
    structure = fold_batchnorm(model, x)
    fold_structure(twin, structure)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
