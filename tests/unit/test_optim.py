"""Parameter groups by module type, and layer decay as far as the optimizer."""

import pytest
import timm
import torch
from torch import nn

from penstock.backbones import Backbone
from penstock.engine import Engine
from penstock.errors import InputError
from penstock.optim import Optim, parameter_groups
from pretrain.methods.mae import MAE


class Holder(nn.Module):
    """As a task holds a backbone, and a head on it."""

    def __init__(self, name: str, **options):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.model = timm.create_model(name, num_classes=0, **options)
        self.head = nn.Linear(self.backbone.model.num_features, 3)


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
MODELS = [
    ("vit_tiny_patch16_224", SMALL_VIT | {"init_values": 1e-4, "reg_tokens": 2, "qk_norm": True}),
    ("resnet18", {}),
    ("convnext_atto", {}),
    ("test_efficientnet", {}),
]


def plain_rule(name: str, param: nn.Parameter, module: nn.Module) -> bool:
    """Decayed or not, independently of `kind_of`: matrices and kernels are, all that stands by itself is not."""
    if param.ndim <= 1 or "norm" in type(module).__name__.lower():
        return False
    return not any(word in name for word in ("cls_token", "reg_token", "mask_token", "pos_embed"))


@pytest.mark.parametrize("name,options", MODELS, ids=[name for name, _ in MODELS])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_each_parameter_is_in_one_group_and_the_right_one(name, options, layer_decay):
    module = Holder(name, **options)
    module.head.bias.requires_grad_(False)
    groups = parameter_groups(module, layer_decay)
    names = [each for group in groups for each in group.names]
    trainable = {each: param for each, param in module.named_parameters() if param.requires_grad}
    assert sorted(names) == sorted(trainable)
    for group in groups:
        assert len(group.names) == len(group.params)
        for each, param in zip(group.names, group.params, strict=True):
            assert param is trainable[each]
            owner = module.get_submodule(each.rpartition(".")[0])
            assert group.decayed == plain_rule(each, param, owner), each
    assert len({(group.lr_scale, group.decayed) for group in groups}) == len(groups)  # ZeRO keeps a buffer for each


def test_a_shared_parameter_is_in_one_group():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    assert [group.names for group in parameter_groups(module)] == [["0.weight"]]


def test_kinds_can_be_decayed_after_all():
    module = Holder("vit_tiny_patch16_224", **SMALL_VIT)
    decayed = {n for g in parameter_groups(module, no_decay=("norm", "bias")) if g.decayed for n in g.names}
    assert {"backbone.model.cls_token", "backbone.model.pos_embed"} <= decayed
    assert not any("norm" in name or name.endswith("bias") for name in decayed)


def test_nothing_to_train_is_refused():
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(InputError, match="trainable"):
        parameter_groups(module)


def test_decay_of_mae_vit_base():
    """Which weights of the published model are decayed, by name; position embeddings are buffers there."""
    with torch.device("meta"):
        backbone = Backbone(Backbone.Config(name="vit_base_patch16_224"))
    backbone.model.to_empty(device="cpu")
    task = MAE(MAE.Config(), backbone, 0)
    decayed = {n: g.decayed for g in parameter_groups(task) for n in g.names}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"backbone.model.blocks.{i}.{layer}.weight" for i in range(12) for layer in layers}
    matrices |= {f"decoder.blocks.{i}.{layer}.weight" for i in range(8) for layer in layers}
    matrices |= {"backbone.model.patch_embed.proj.weight"}
    rest = {name for name, yes in decayed.items() if yes} - matrices
    assert matrices <= {name for name, yes in decayed.items() if yes}
    assert {name.split(".", 1)[0] for name in rest} == {"decoder"} and len(rest) == 2, rest  # embedding, prediction
    kept = {name for name, yes in decayed.items() if not yes}
    assert {"backbone.model.cls_token", "backbone.model.norm.weight", "backbone.model.patch_embed.proj.bias"} <= kept
    assert not any("pos_embed" in name for name in decayed)


# Layer decay ---------------------------------------------------------------------------------------


def layer_of(name: str, depth: int) -> int:
    """As BEiT counts: 0 the embeddings, 1 to depth the blocks, then all the rest: the last norm and the head."""
    if "blocks." in name:
        return int(name.split("blocks.")[1].split(".")[0]) + 1
    return 0 if any(word in name for word in ("patch_embed", "pos_embed", "cls_token")) else depth + 1


def rates(rank: int, world: int, zero: int) -> dict[str, float]:
    """The rate of each parameter by what a step of SGD without momentum moves it, for a gradient of ones."""
    torch.manual_seed(0)
    task = Holder("vit_tiny_patch16_224", **SMALL_VIT)
    task.forward = lambda batch, knobs: sum(param.sum() for param in task.parameters())
    config = Optim.Config(name="momentum", lr=1.0, momentum=0.0, layer_decay=0.5)
    engine = Engine(task, Optim(config).build(task, 8), Engine.Config(zero=zero, precision="fp32"), 1)
    before = engine.weights()
    engine.set({"lr": 0.2, "weight_decay": 0.0})
    engine.begin(torch.tensor(1.0))
    loss = engine._ds(None, {})
    engine._ds.backward(loss)
    engine._micro_step = 1
    engine.step()
    after = engine.weights()
    return {name: float((before[name] - value).mean()) for name, value in after.items() if "running" not in name}


@pytest.mark.parametrize("zero", [0, 1])
def test_layer_decay_reaches_the_weights(ranks, zero):
    for moved in ranks(2).run(rates, zero):
        for name, rate in moved.items():
            want = 0.2 * 0.5 ** (4 - layer_of(name, depth=3))
            assert rate == pytest.approx(want, rel=1e-3), name


def test_a_rate_for_a_batch_grows_with_the_batch():
    assert Optim.Config(base_lr=0.1).peak(1024) == pytest.approx(0.4)
    assert Optim.Config(base_lr=0.1, per=1024).peak(256) == pytest.approx(0.025)
    assert Optim.Config(base_lr=0.1, scaling="sqrt").peak(1024) == pytest.approx(0.2)
    assert Optim.Config(lr=0.1).peak(1024) == 0.1


@pytest.mark.parametrize(
    "fields,says",
    [
        ({"name": "adamww"}, "did you mean 'adamw'"),
        ({"options": {"no": 1}}, "no"),
        ({"name": "sgd", "momentum": 0}, "Nesterov"),
    ],
)
def test_optimizers_that_cannot_be_made(fields, says):
    with pytest.raises(InputError, match=says):
        Optim(Optim.Config(lr=0.1, **fields)).build(nn.Linear(2, 2), 8)
