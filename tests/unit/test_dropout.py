"""Dropouts of timm models: laid out as timm does, moved by curves, refused where a model has none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from penstock.backbones import Backbone, names
from penstock.backbones.dropout import ARGUMENTS, Drop, drop_rules, largest
from penstock.errors import InputError
from penstock.schedule import Clock, value_at

VIT, TINY = "vit_tiny_patch16_224", {"depth": 4, "embed_dim": 32, "num_heads": 2}


def _made(name: str, options: dict | None = None, size: int = 32, **values: Any) -> tuple[Any, Drop]:
    timm = pytest.importorskip("timm")
    config = Drop.Config(**values)
    extra = {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=0, **(options or {}), **extra, **config.timm_arguments(name))
    return model, Drop(config, model, nn.Dropout() if config.head else None)


def test_drop_path_grows_linearly_from_zero():
    model, drop = _made(VIT, TINY, path=0.3)
    layout = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert layout == pytest.approx(torch.linspace(0, 0.3, 4).tolist())
    drop.set({"path": 0.15})
    layout = [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks]
    assert layout == pytest.approx(torch.linspace(0, 0.15, 4).tolist())
    drop.set({"path": 0.0})
    assert set(drop.rates()["path"]) == {0.0}
    drop.set({"path": 0.3})
    assert drop.rates()["path"] == pytest.approx(torch.linspace(0, 0.3, 4)[1:].repeat_interleave(2).tolist())


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "regnetx_002"])
def test_drop_path_of_cnns_is_timms(name):
    timm = pytest.importorskip("timm")
    _, drop = _made(name, path=0.2)
    drop.set({"path": 0.1})
    theirs = timm.create_model(name, num_classes=0, drop_path_rate=0.1)
    rates = [m.drop_prob for m in theirs.modules() if isinstance(m, timm.layers.DropPath) and m.drop_prob > 0]
    assert rates and drop.rates()["path"] == pytest.approx(rates)


def test_each_kind_finds_its_own_modules():
    model, drop = _made(VIT, {**TINY, "pos_drop_rate": 0.05}, path=0.1, attention=0.2, proj=0.3, patch=0.4, head=0.5)
    counts = {kind: len(rates) for kind, rates in drop.rates().items()}
    assert counts == {"head": 1, "path": 2 * 3, "attention": 4, "proj": 3 * 4, "patch": 1}
    drop.set({"attention": 0.11, "proj": 0.12, "patch": 0.13, "head": 0.14})
    block = model.blocks[2]
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == pytest.approx(
        (0.11, 0.12, 0.12, 0.12)
    )
    assert (model.patch_drop.prob, drop.rates()["head"][0], model.pos_drop.p) == pytest.approx((0.13, 0.14, 0.05))


def test_off_means_off_where_timm_has_a_default():
    timm = pytest.importorskip("timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1))
    assert max(m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)) > 0
    Drop(Drop.Config(), model)
    assert max(m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)) == 0


def test_a_curve_changes_what_the_model_draws():
    config = Drop.Config(path={"name": "linear", "start": 0.0, "end": 0.4}, proj={"name": "constant", "start": 0.2})
    assert (largest(config.path), largest(config.proj)) == (0.4, 0.2)
    _, drop = _made(VIT, TINY, path=config.path)
    clock = Clock(10, 1, 1)
    for step in (0, 5, 10):
        drop.set({"path": value_at(config.path, step, clock)})
        assert drop.rates()["path"][-1] == pytest.approx(0.04 * step)


def test_draws_keep_the_mean_and_are_per_sample():
    _, drop = _made(VIT, TINY, path=0.4)
    layer = drop.places["path"][-1].module.train()
    drop.set({"path": 0.25})
    torch.manual_seed(0)
    drawn = layer(torch.ones(20_000, 2, 3))
    assert drawn.mean() == pytest.approx(1.0, abs=4 * (0.25 / 0.75 / 20_000) ** 0.5)
    assert drawn.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(drawn, drawn[:, :1, :1].expand_as(drawn))  # a sample's branch is dropped whole
    assert (drawn[:, 0, 0] == 0).float().mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("kind", ["attention", "proj"])
def test_dropout_keeps_the_mean(kind):
    values: dict[str, Any] = {kind: 0.5}
    _, drop = _made(VIT, TINY, **values)
    drop.set({kind: 0.2})
    torch.manual_seed(0)
    drawn = drop.places[kind][0].module.train()(torch.ones(20_000))
    assert drawn.mean() == pytest.approx(1.0, abs=4 * (0.2 / 0.8 / 20_000) ** 0.5)


def test_evaluation_is_the_model_without_dropout_and_training_draws_again_from_a_seed():
    model, drop = _made(VIT, TINY, path=0.3, attention=0.3, proj=0.3, patch=0.5)
    plain, _ = _made(VIT, TINY)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), plain.eval()(images))
        model.train()
        drawn = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            drawn.append(model(images))
        assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
        drop.set(dict.fromkeys(ARGUMENTS, 0.0))
        assert torch.allclose(model(images), plain(images), atol=1e-6)


def test_patch_dropout_shortens_the_sequence():
    model, drop = _made(VIT, TINY, size=64, patch=0.75)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    for value in (0.75, 0.5, 0.0):
        drop.set({"patch": value})
        model.train()(torch.randn(1, 3, 64, 64))
    assert seen == [1 + 4, 1 + 8, 1 + 16]


@pytest.mark.parametrize(
    ("name", "kind"), [("resnet50", "patch"), ("resnet50", "attention"), ("swin_tiny_patch4_window7_224", "patch")]
)
def test_a_kind_that_a_model_lacks_is_refused(name, kind):
    with pytest.raises(InputError, match=rf"drop\.{kind}: {name} has no .*it has path"):
        Drop.Config(**{kind: 0.1}).timm_arguments(name)


def test_what_timms_source_does_not_tell_is_found_in_the_model():
    timm = pytest.importorskip("timm")
    assert names.arguments("regnety_002") is None
    model = timm.create_model("regnety_002", num_classes=0)
    with pytest.raises(InputError, match=r"drop\.proj: RegNet has no dropout after attention"):
        Drop(Drop.Config(proj=0.1), model)
    with pytest.raises(InputError, match=r"drop\.head: there is no classifier"):
        Drop(Drop.Config(head=0.1), model)


def test_arguments_read_from_the_source_are_those_of_the_class():
    timm = pytest.importorskip("timm")
    import inspect

    for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0", "deit_tiny_patch16_224"):
        kind = type(timm.create_model(name))
        assert names.arguments(name) == set(inspect.signature(kind.__init__).parameters), name


def test_rules_across_blocks():
    def recipe(compile=False, options=None, name=VIT, **values):
        backbone = Backbone.Config(name=name, options=options or {})
        return SimpleNamespace(drop=Drop.Config(**values), backbone=backbone, engine=SimpleNamespace(compile=compile))

    linear = {"name": "linear", "start": 0.1, "end": 0.3}
    steps = {"name": "step", "start": 0.1, "milestones": ["5 steps"], "values": [0.3]}
    assert not list(drop_rules(recipe(path=linear)))
    assert not list(drop_rules(recipe(compile=True, path=steps, head=0.1)))
    assert "compiles the model anew" in next(drop_rules(recipe(compile=True, path=linear)))
    assert "set by drop.path" in next(drop_rules(recipe(options={"drop_path_rate": 0.1})))
    assert "set by drop.head" in next(drop_rules(recipe(options={"drop_rate": 0.1})))
    assert next(drop_rules(recipe(name="resnet50", patch=0.1))).startswith("drop.patch: resnet50 has no patch dropout")


DOWN_FROM_ONE = {"name": "linear", "end": 0.1}
UP_BY_STEPS = {"name": "step", "start": 0.5, "factor": 3, "milestones": [0.5]}
UP_AND_DOWN = {"name": "one_cycle", "start": 0.0, "top": 1.2, "end": 0.0}


@pytest.mark.parametrize("value", [1.0, -0.1, DOWN_FROM_ONE, UP_BY_STEPS, UP_AND_DOWN])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(ValidationError, match="a probability lies in"):
        Drop.Config(path=value)
