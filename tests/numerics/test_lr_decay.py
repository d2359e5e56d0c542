"""Rates per layer and decay of MAE's finetuning, parameter by parameter, as the reference's own code gives them."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from penstock.optim import layer_numbers, parameter_groups

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("lr_decay.json").read_text(encoding="utf-8"))


class Classifier(nn.Module):
    def __init__(self, name: str, **options):
        super().__init__()
        self.backbone = nn.Module()
        with torch.device("meta"):
            self.backbone.model = timm.create_model(name, num_classes=0, **options)
            self.head = nn.Linear(self.backbone.model.num_features, 1000)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_groups_of_mae_vit_base(pool):
    task = Classifier("vit_base_patch16_224", global_pool=pool)
    groups = parameter_groups(task, layer_decay=0.65)
    ours = {
        name.removeprefix("backbone.model."): (group.lr_scale, 0.05 * group.decayed)
        for group in groups
        for name in group.names
    }
    assert ours.keys() == GOLDEN[pool].keys() and len(ours) == 152
    for name, (scale, decay) in GOLDEN[pool].items():
        assert ours[name] == (pytest.approx(scale, rel=1e-12), decay), name
    assert len({group.lr_scale for group in groups}) == 14


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "swin_tiny_patch4_window7_224", "efficientnet_b0"])
def test_other_models_are_numbered_as_timm_does_with_a_classifier(name):
    from timm.models import group_parameters

    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=10)
    want = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
    layers, top = layer_numbers(Classifier(name).backbone.model)
    heads = set(want) - set(layers)
    assert heads and {want[head] for head in heads} == {top}
    assert {layer: want[layer] for layer in layers} == layers
