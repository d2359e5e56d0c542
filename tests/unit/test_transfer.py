"""Which parts train, and in which mode the others are; LoRA starts as the identity and merges exactly."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.transfer import TRANSFERS, Transfer, trained_share
from finetune.transfer._layers import layers, modules_of
from penstock.backbones import Backbone
from penstock.errors import InputError
from penstock.head import Head
from penstock.schedule import Clock
from penstock.task import Task

CLOCK = Clock(total=100, batch=4, epoch=40)
VIT = {
    "name": "vit_tiny_patch16_224",
    "size": 16,
    "options": {
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "drop_path_rate": 0.3,
        "proj_drop_rate": 0.2,
        "pos_drop_rate": 0.1,
        "patch_drop_rate": 0.25,
    },
}
CNN = {"name": "test_resnet", "size": 32}


def task_of(fields: Mapping[str, Any]) -> Task:
    torch.manual_seed(0)
    task = Task()
    task.backbone = Backbone(Backbone.Config(**fields))
    for layer in task.backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)  # timm starts residual branches at 0
    task.head = Head(Head.Config(), task.backbone.dim, 3, task.backbone)
    return task


def prepared(task: Task, kind: str, **options: Any) -> Transfer:
    made = TRANSFERS.get(kind)
    transfer = made(made.Config(**options))
    transfer.prepare(task, CLOCK)
    return transfer


def training(task: nn.Module) -> set[str]:
    return {name for name, module in task.named_modules() if module.training}


@pytest.mark.parametrize("fields", [VIT, CNN])
@pytest.mark.parametrize("kind", TRANSFERS.names())
def test_modes_follow_the_parameters(fields: dict[str, Any], kind: str) -> None:
    """No module of the backbone is in training mode below everything that trains, and the head always is."""
    task = task_of(fields)
    if kind == "lora" and fields is CNN:
        return
    transfer = prepared(task, kind)
    task.train()
    transfer.set_mode(task, 0.0)
    modes = training(task)
    assert "head.linear" in modes and "head.drop" in modes
    closed = transfer.opens(task, CLOCK)
    for name, module in task.backbone.named_modules(prefix="backbone"):
        own = dict(module.named_parameters(prefix=name, recurse=False))
        if own and kind != "lora" and name != "backbone.model":  # a ViT's own tokens make it no closed module
            trains = any(p.requires_grad and closed.get(n, 0.0) <= 0 for n, p in own.items())
            assert (name in modes) == trains, name
    if kind == "head":
        assert not any(name.startswith("backbone") for name in modes)
    if kind == "last_blocks" and fields is VIT:
        assert "backbone.model.pos_drop" not in modes and "backbone.model.patch_drop" not in modes
        assert "backbone.model.blocks.1.drop_path1" not in modes and "backbone.model.blocks.2.drop_path1" in modes
    if kind == "full":
        assert modes == {name for name, _ in task.named_modules()}


def test_frozen_features_do_not_change_with_dropout_or_batches() -> None:
    """The backbone of a probe gives the same features in training, whatever its drop rates and its batch norm."""
    for fields in (VIT, CNN):
        task = task_of(fields)
        transfer = prepared(task, "head")
        images = torch.randint(0, 256, (4, 3, *task.backbone.size), dtype=torch.uint8)
        task.eval()
        want, before = task.backbone(images).pooled, copy.deepcopy(task.backbone.state_dict())
        transfer.set_mode(task, 0.0)
        assert not task.training  # a task that is evaluated is left alone
        task.train()
        assert not torch.equal(task.backbone(images).pooled, want)
        task.backbone.load_state_dict(before)
        transfer.set_mode(task, 0.0)
        got = task.backbone(images).pooled
        assert torch.equal(got, want) and not got.requires_grad
        assert all(torch.equal(value, before[name]) for name, value in task.backbone.state_dict().items())


def test_gradual_opens_modes_with_parameters() -> None:
    task = task_of(CNN)
    with pytest.raises(InputError, match=r"steps 10, 10 of 100; the times must grow"):
        prepared(task, "gradual", at=("10 steps", "1 epoch"))
    with pytest.raises(InputError, match="before the end"):
        prepared(task, "gradual", at=("10 steps", "100 steps"))
    with pytest.raises(InputError, match="60 times for"):
        prepared(task, "gradual", at=tuple(f"{step} steps" for step in range(1, 61)))
    transfer = prepared(task, "gradual", at=("10 steps", "20 steps", "50%"))
    opens = transfer.opens(task, CLOCK)
    assert set(opens.values()) == {10.0, 20.0, 50.0}
    assert opens["backbone.model.conv1.0.weight"] == 50.0
    seen = []
    for time in (0.0, 9.9, 10.0, 20.0, 49.0, 50.0):
        task.train()
        transfer.set_mode(task, time)
        in_training = training(task)
        for name, opening in opens.items():
            assert (name.rpartition(".")[0] in in_training) == (opening <= time), (name, time)
        seen.append(len(in_training))
    assert seen == sorted(seen) and len(set(seen)) == 4
    # Without `task.train()` in between, too: what opens is put in training mode.
    transfer.set_mode(task, 0.0)
    transfer.set_mode(task, 50.0)
    assert training(task) == {name for name, _ in task.named_modules()}


def test_layers_of_known_networks() -> None:
    vit = layers(task_of(VIT).backbone.model)
    assert len(vit) == 4 and vit[-1][-2:] == ["norm.weight", "norm.bias"]
    assert {name.split(".")[0] for name in vit[0]} == {"cls_token", "pos_embed", "patch_embed"}
    fc_norm = {**VIT, "pool": "avg", "options": {**VIT["options"], "fc_norm": True}}  # type: ignore[dict-item]
    assert [len(layer) for layer in layers(task_of(fc_norm).backbone.model)] == [len(layer) for layer in vit]
    resnet = task_of({"name": "resnet18", "size": 32}).backbone.model
    assert [layer[0] for layer in layers(resnet)][:3] == [
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.1.conv1.weight",
    ]
    for model in (resnet, task_of({"name": "efficientnet_b0", "size": 32}).backbone.model):
        named = [name for layer in layers(model) for name in layer]
        assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    with pytest.raises(InputError, match="Sequential has no order of layers"):
        layers(nn.Sequential())


def test_last_blocks_counts_blocks() -> None:
    task = task_of(VIT)
    prepared(task, "last_blocks", blocks=2)
    trained = {name for name, param in task.named_parameters() if param.requires_grad}
    assert {name.split(".")[3] for name in trained if ".blocks." in name} == {"1", "2"}
    assert {name for name in trained if ".blocks." not in name} == {
        *("backbone.model.norm.weight", "backbone.model.norm.bias", "head.linear.weight", "head.linear.bias"),
    }
    with pytest.raises(InputError, match=r"transfer.blocks: 4 of 4 layers.*at most 3"):
        prepared(task_of(VIT), "last_blocks", blocks=4)


def test_modules_without_parameters_go_with_what_is_before_them() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert list(modules_of(net, {"1.weight", "1.bias"})) == ["1", "2"]
    assert list(modules_of(net, {"3.0.weight"})) == []
    assert list(modules_of(net, {"3.0.weight", "3.0.bias"})) == ["3"]


# LoRA


def lora_task(**options: Any) -> tuple[Task, Transfer, dict[str, Tensor]]:
    task = task_of(VIT)
    before = copy.deepcopy(task.state_dict())
    return task, prepared(task, "lora", **options), before


def test_lora_starts_as_the_identity() -> None:
    plain, (task, _, _) = task_of(VIT).eval(), lora_task()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(task.eval().backbone(images).pooled, plain.backbone(images).pooled)
    said = trained_share(task)
    trained = sum(p.numel() for n, p in task.named_parameters() if ".lora_" in n or n.startswith("head."))
    assert said.startswith(f"{trained:,} of ") and "parameters train" in said


@pytest.mark.parametrize("fields,modules", [(VIT, None), (CNN, r".*\.conv[12]")])
def test_merged_lora_gives_the_same_outputs_under_timms_names(fields: dict[str, Any], modules: str | None) -> None:
    task = task_of(fields)
    names = task.state_dict().keys()
    transfer = prepared(task, "lora", rank=3, alpha=5.0, modules=modules)
    for name, param in task.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(param, std=0.3)
    state = transfer.merged(task.state_dict())
    assert state.keys() == names
    merged = task_of(fields)
    merged.load_state_dict(state)
    images = torch.randint(0, 256, (2, 3, *task.backbone.size), dtype=torch.uint8)
    task, merged = task.double().eval(), merged.double().eval()
    with torch.no_grad():
        want, got = task.backbone(images).pooled, merged.backbone(images).pooled
    assert not torch.allclose(want, task_of(fields).double().eval().backbone(images).pooled, atol=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_lora_refuses_what_it_cannot_adapt() -> None:
    with pytest.raises(InputError, match=r"transfer.modules: .* names no linear layer or convolution of ResNet"):
        prepared(task_of(CNN), "lora")
    with pytest.raises(InputError, match="grouped convolution"):
        prepared(task_of({"name": "mobilenetv3_small_050", "size": 32}), "lora", modules=r".*conv_dw")
    with pytest.raises(ValueError, match="not a regular expression"):
        TRANSFERS.get("lora").Config(modules="(")
