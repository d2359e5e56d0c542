"""MAE's finetuning and linear probing by the published recipes, against the reference's own code (golden numbers)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.losses.cross_entropy import CrossEntropy
from finetune.recipe import Finetune
from penstock.backbones import Backbone
from penstock.head import Head
from penstock.optim import Optim, parameter_groups, write
from penstock.recipe import check, load
from penstock.schedule import Clock, Curves
from tests.numerics import formula
from tests.numerics.golden.make_mae_finetune import BATCH, LARS_SHAPE, SMALL, STEPS_PER_EPOCH, targets

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("mae_finetune.json").read_text(encoding="utf-8"))
FILES = {"b": "finetune_mae_vitb16.yaml", "l": "finetune_mae_vitl16.yaml", "probe": "linear_mae_vitb16.yaml"}


@pytest.fixture
def recipe_of(packed_set):
    """A published recipe, on stand-in data and without its weights."""

    def recipe(which: str, *overrides: str) -> Any:
        absent = [f"data.train={packed_set}", f"data.val={packed_set}", "backbone.weights=null"]
        return check(Finetune, load(ROOT / "configs/imagenet1k" / FILES[which], [*absent, *overrides]))

    return recipe


@pytest.fixture(scope="module")
def packed_set(tmp_path_factory) -> Path:
    from tests.shards import write_set

    folder = tmp_path_factory.mktemp("set")
    write_set(folder, [3])
    return folder


class Classifier(nn.Module):
    """Backbone and head as the finetuning task holds them."""

    def __init__(self, recipe: Any, classes: int):
        super().__init__()
        options = {**recipe.backbone.options, **recipe.drop.timm_arguments(recipe.backbone.name)}
        self.backbone = Backbone(recipe.backbone.model_copy(update={"options": options}))
        self.head = Head(recipe.head, self.backbone.dim, classes, self.backbone)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


def small(recipe_of, which: str) -> Classifier:
    """The recipe's network with the golden numbers' sizes and weights."""
    sizes = {key: SMALL[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    side = SMALL["img_size"]
    options = [f"backbone.options.{key}={value}" for key, value in sizes.items()]
    recipe = recipe_of(which, f"backbone.size={side}", f"augment.size={side}", "drop.path=0", *options)
    model = Classifier(recipe, SMALL["num_classes"]).double()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(formula.weight(theirs(name), param.shape))
    return model


def theirs(name: str) -> str:
    """The reference's name of a parameter."""
    return name.replace("backbone.model.", "").replace("head.linear.", "head.")


def images() -> torch.Tensor:
    return 2 * formula.tensor("images", (BATCH, 3, SMALL["img_size"], SMALL["img_size"]))


@pytest.mark.parametrize(("which", "pool"), [("b", "avg"), ("probe", "token")])
def test_outputs_and_gradients(recipe_of, which, pool):
    golden = GOLDEN["outputs"][pool]
    model = small(recipe_of, which)
    if which == "probe":
        model.head.norm = nn.Identity()  # compared by itself below
    logits = model(images())
    assert torch.allclose(logits, torch.tensor(golden["logits"]), atol=1e-6)
    loss = CrossEntropy(CrossEntropy.Config())(logits, targets()).mean()
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-6)
    loss.backward()
    ours: dict[str, list[float]] = {}
    for name, param in model.named_parameters():
        assert param.grad is not None
        ours[theirs(name)] = formula.summary(theirs(name), param.grad)
    assert ours.keys() == golden["gradients"].keys()
    for name, (norm, product) in golden["gradients"].items():
        assert ours[name] == pytest.approx([norm, product], rel=1e-5, abs=1e-6 * max(norm, 1e-3)), name


def test_the_class_token_is_not_pooled(recipe_of):
    """The global pool is over patches alone: a token that changes behind the last block changes nothing."""
    model = small(recipe_of, "b").eval()
    hidden = model.backbone.model.forward_features(images())
    other = hidden.clone()
    other[:, 0] += 1
    pooled = model.backbone.model.forward_head(hidden, pre_logits=True)
    assert torch.equal(pooled, model.backbone.model.forward_head(other, pre_logits=True))
    other[:, 1] += 1
    assert not torch.equal(pooled, model.backbone.model.forward_head(other, pre_logits=True))


@pytest.mark.parametrize("size", ["b", "l"])
def test_groups_rates_and_decay_of_every_parameter(recipe_of, size):
    recipe = recipe_of(size)
    with torch.device("meta"):
        model = Classifier(recipe, 1000)
    groups = parameter_groups(model, recipe.optim.layer_decay, recipe.optim.no_decay)
    want = {
        name: (group["lr_scale"], group["weight_decay"]) for group in GOLDEN["groups"][size] for name in group["params"]
    }
    written = [group.as_dict() | {"cautious": recipe.optim.cautious_decay} for group in groups]
    assert {theirs(name) for group in groups for name in group.names} == want.keys()
    # The reference drops the last batch of an epoch; here it goes on into the next one. So an epoch of whole batches.
    clock = Clock.of(recipe.duration, recipe.batch, STEPS_PER_EPOCH * recipe.batch)
    curves = Curves(recipe.optim.knobs, clock, {"lr": recipe.optim.peak})
    assert clock.total == STEPS_PER_EPOCH * {"b": 100, "l": 50}[size]
    for step, rate in GOLDEN["rates"][size].items():
        write(written, curves.at(int(step), recipe.batch), now=float(step))
        for group in written:
            for name in group["names"]:
                scale, decay = want[theirs(name)]
                assert group["lr"] == pytest.approx(rate * scale, rel=1e-9, abs=1e-18), (name, step)
                assert group["weight_decay"] == decay, (name, step)
    assert curves.at(clock.total, recipe.batch)["lr"] == pytest.approx(1e-6)


def test_optimizer_and_head(recipe_of):
    recipe = recipe_of("b", "backbone.options.depth=1", "drop.path=0")
    model = Classifier(recipe, 1000)
    optimizer = Optim(recipe.optim).build(model, recipe.batch)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)
    weight = model.head.linear.weight
    assert weight.std().item() == pytest.approx(2e-5, rel=0.01) and (model.head.linear.bias == 0).all()


def test_drop_path_grows_with_depth(recipe_of):
    for size, last in (("b", 0.1), ("l", 0.2)):
        with torch.device("meta"):
            model: Any = Classifier(recipe_of(size), 10).backbone.model
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
        assert rates == pytest.approx(torch.linspace(0, last, len(rates)).tolist(), abs=1e-7)


def test_the_probe_normalises_like_the_reference(recipe_of):
    model = small(recipe_of, "probe")
    model.backbone.eval()
    with torch.no_grad():
        features = model.backbone(images())
        trained = model.head(features)
        model.head.eval()
        evaluated = model.head(features)
    assert torch.allclose(trained, torch.tensor(GOLDEN["probe"]["training"]), atol=1e-5)
    assert torch.allclose(evaluated, torch.tensor(GOLDEN["probe"]["evaluation"]), atol=1e-5)
    assert not torch.allclose(trained, evaluated, atol=1e-2)


def test_the_probe_steps_like_the_reference(recipe_of):
    """LARS on the weight. (The bias is scaled as well here, and not there: the recipe's header says so.)"""
    optim = recipe_of("probe").optim
    assert optim.peak(16384) == pytest.approx(6.4)

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(formula.tensor("probe", LARS_SHAPE) * 0.01)

    probe = Probe()
    optimizer = Optim(optim).build(probe, 16384)
    for step, golden in enumerate(GOLDEN["lars"]):
        probe.weight.grad = formula.tensor(f"gradient {step}", LARS_SHAPE)
        optimizer.step()
        assert formula.summary("probe", probe.weight.detach()) == pytest.approx(golden, rel=1e-6)
