"""DeiT's distillation token: the same outputs as timm's own model, in training, in eval mode and exported; its loss."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.distillation import Widths
from finetune.distillation.hard_labels import HardLabels
from finetune.head_init import initialise
from finetune.tasks.distill import Distill
from finetune.transfer import TRANSFERS
from penstock.backbones import Backbone
from penstock.backbones.dropout import Drop
from penstock.class_names import imagenet_names
from penstock.errors import InputError
from penstock.export import export_backbone, export_classifier, load_classifier
from penstock.head import Head
from penstock.optim import parameter_groups
from penstock.schedule import Clock
from penstock.streams.batch import Batch
from tests.numerics.test_distill import CLASSES, MIXES, batch_of, task_of, teacher

OPTIONS: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
TOKEN: dict[str, Any] = {"name": "deit_tiny_distilled_patch16_224", "size": 16, "options": OPTIONS}
PLAIN: dict[str, Any] = {"name": "deit_tiny_patch16_224", "size": 16, "options": OPTIONS}
ANIMALS: tuple[str, ...] = ("ant", "bee", "cat", "dog")


def pair(kind: str = "distilled", classes: int = 4, seed: int = 0, **head: Any) -> tuple[Backbone, Head]:
    torch.manual_seed(seed)
    backbone = Backbone(Backbone.Config(**TOKEN))
    made = Head(Head.Config(kind=kind, init_std=0.5, **head), backbone.dim, classes, backbone)
    for layer in made.layers:
        nn.init.normal_(layer.bias)
    return backbone.eval(), made.eval()


def timms(backbone: Backbone, head: Head) -> Any:
    """timm's own model with the same weights."""
    model = timm.create_model(TOKEN["name"], num_classes=head.linear.out_features, img_size=16, **OPTIONS)
    weights = dict(backbone.model.state_dict())
    for name, layer in zip(("head", "head_dist"), (head.layers * 2)[:2], strict=True):
        weights |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    model.load_state_dict(weights)
    return model.eval()


def images_of(backbone: Backbone) -> Tensor:
    return torch.randint(0, 256, (4, 3, *backbone.size), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def state_of(backbone: Backbone, head: Head) -> dict[str, Tensor]:
    found = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    return found | {f"head.{name}": value for name, value in head.state_dict().items()}


def export(tmp_path: Path, backbone: Backbone, head: Head) -> Path:
    return export_classifier(state_of(backbone, head), backbone.config, head.config, tmp_path / "deit", ANIMALS)


# Outputs --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_answers_in_training_and_their_mean_in_eval_mode_as_timm_gives_them():
    backbone, head = pair()
    model, images = timms(backbone, head), images_of(backbone)
    features = backbone(images)
    torch.testing.assert_close(head(features), model(backbone.normalize(images)))
    model.set_distilled_training(True)
    model.train(), backbone.train(), head.train()  # without dropout nothing else changes
    label, taught = model(backbone.normalize(images))
    ours = head.both(backbone(images))
    torch.testing.assert_close(ours[0], label)
    torch.testing.assert_close(ours[1], taught)
    assert (label - taught).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["distilled", "linear"])
def test_exports_give_the_same_outputs_in_timm_and_here(tmp_path, kind):
    backbone, head = pair(kind)
    images = images_of(backbone)
    want = head(backbone(images))
    torch.testing.assert_close(timms(backbone, head)(backbone.normalize(images)), want)
    folder = export(tmp_path, backbone, head)
    torch.testing.assert_close(load_classifier(folder)(images), want)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert load_classifier(folder).head.config.kind == kind and opened.num_classes == 4
    torch.testing.assert_close(opened(backbone.normalize(images)), want)


@torch.no_grad()
def test_sizes_may_follow_a_curve():
    backbone, head = pair()
    larger = F.interpolate(images_of(backbone).float(), (24, 24)).to(torch.uint8)
    model = timm.create_model(TOKEN["name"], num_classes=4, img_size=16, dynamic_img_size=True, **OPTIONS)
    model.load_state_dict(timms(backbone, head).state_dict())
    torch.testing.assert_close(head(backbone(larger)), model.eval()(backbone.normalize(larger)))


def test_without_a_token_it_is_refused():
    backbone = Backbone(Backbone.Config(**PLAIN))
    with pytest.raises(InputError, match=r"patch16_224 has no distillation token; take .*, or head.kind=linear"):
        Head(Head.Config(kind="distilled"), backbone.dim, 4, backbone)
    with pytest.raises(ValueError, match="layer is not for the distilled kind"):
        Head.Config(kind="distilled", norm="layer")
    with pytest.raises(InputError, match=r"backbone.pool='avg' does not fit"):
        Backbone(Backbone.Config(**TOKEN, pool="avg"))


# The loss -------------------------------------------------------------------------------------------------------


def distillation(folder: Path) -> Any:
    """A task with a student of two tokens, DeiT's weights of the losses, and smoothed labels."""
    task = task_of(Distill, teacher(folder, name="test_resnet", size=16), TOKEN)
    torch.manual_seed(5)
    head = Head(Head.Config(kind="distilled", init_std=0.5), task.backbone.dim, len(CLASSES), task.backbone)
    task.head = head
    task.losses = nn.ModuleDict({"hard_labels": HardLabels(HardLabels.Config(), Widths(3, 24), Widths(3, 24))})
    return task


@pytest.mark.parametrize("mixed", [True, False])
def test_the_loss_is_deits(tmp_path, mixed):
    """Touvron et al. 2021, equation 3: half of each; value and gradient, on mixed images, with a bad slot."""
    from timm.loss import SoftTargetCrossEntropy

    task = distillation(tmp_path)
    batch = batch_of(range(8), bad=(2,))
    knobs = {"labels": 0.5, "hard_labels.weight": 0.5, **(MIXES if mixed else dict.fromkeys(MIXES, 0.0))}
    output = task(batch, knobs)
    output.loss.backward()
    images, targets = task.mixed(batch, knobs)
    model = timms(task.backbone, task.head).train()
    model.set_distilled_training(True)
    label, taught = model(images)
    its = task.apart.teacher(images, task.backbone).logits.argmax(1)
    valid = batch.weights > 0
    loss = 0.5 * SoftTargetCrossEntropy()(label[valid], targets[valid])
    loss = loss + 0.5 * F.cross_entropy(taught[valid], its[valid])
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    theirs = {name: param.grad for name, param in model.named_parameters()}
    for ours, name in (("linear", "head"), ("second", "head_dist")):
        torch.testing.assert_close(task.head.get_submodule(ours).weight.grad, theirs[f"{name}.weight"])
        torch.testing.assert_close(task.head.get_submodule(ours).bias.grad, theirs[f"{name}.bias"])
    for name, param in task.backbone.model.named_parameters():
        torch.testing.assert_close(param.grad, theirs[name], rtol=1e-4, atol=1e-6)
    assert theirs["dist_token"].abs().max() > 0 and (targets.max(1).values < 0.9).any() == mixed


def test_the_loss_is_that_of_timms_task(tmp_path):
    """On images that are not mixed, with a teacher of timm's whose normalisation is another."""
    from timm.task import TokenDistillationTask

    task, batch = distillation(tmp_path), batch_of()
    task.pieces.loss = type(task.pieces.loss)(type(task.pieces.loss).Config())
    output = task(batch, {"labels": 0.5, "hard_labels.weight": 0.5, **dict.fromkeys(MIXES, 0.0)})
    theirs = TokenDistillationTask(
        timms(task.backbone, task.head),
        timm.create_model(f"local-dir:{tmp_path / 'teacher'}", pretrained=True),
        criterion=nn.CrossEntropyLoss(),
        distill_type="hard",
        task_loss_weight=0.5,
        verbose=False,
    ).train()
    found = theirs(task.backbone.normalize(batch.views[0]), batch.labels)
    torch.testing.assert_close(output.loss, found["loss"])


# Heads that start from others -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["export", "published"])
def test_both_layers_start_by_class_name(tmp_path, form):
    backbone, old = pair(classes=4 if form == "export" else 1000)
    if form == "export":
        source, names = export(tmp_path, backbone, old), ANIMALS
    else:
        source, names = tmp_path / "deit.pth", tuple(imagenet_names(1000) or ())
        model = timms(backbone, old).state_dict()
        torch.save({"model": {f"module.{name}": value for name, value in model.items()}}, source)
    classes = [names[3], "unicorn", names[1]]
    _, head = pair(classes=3, seed=1, init=str(source))
    fresh = [layer.weight[1].clone() for layer in head.layers]
    said = initialise(head, backbone, classes, list)
    features = backbone(images_of(backbone))
    for ours, theirs in zip(head.both(features), old.both(features), strict=True):
        torch.testing.assert_close(ours[:, [0, 2]], theirs[:, [3, 1]])
    assert all(torch.equal(layer.weight[1], row) for layer, row in zip(head.layers, fresh, strict=True))
    assert said.startswith("the head starts with 2 of 3 classes") and said.endswith("unicorn")


def test_layers_of_two_tokens_and_of_one_do_not_mix(tmp_path):
    backbone, two = pair()
    published = tmp_path / "deit.pth"
    torch.save(timms(backbone, pair(classes=1000)[1]).state_dict(), published)
    with pytest.raises(InputError, match=r"linear here.*a layer for each of two tokens; set head.kind=distilled"):
        initialise(pair("linear", 1, init=str(published))[1], backbone, ["tench"], list)
    folder = export(tmp_path, backbone, two)
    with pytest.raises(InputError, match=r"head.kind: linear here, but distilled in the classifier"):
        initialise(pair("linear", init=str(folder))[1], backbone, ANIMALS, list)
    folder = export(tmp_path, *pair("linear"))
    with pytest.raises(InputError, match=r"head.kind: distilled here, but linear in the classifier"):
        initialise(pair(init=str(folder))[1], backbone, ANIMALS, list)
    with pytest.raises(InputError, match=r"head.kind: distilled cannot start from probe"):
        initialise(pair(init="probe")[1], backbone, ANIMALS, list)
    plain = export_backbone(backbone.state_dict(), backbone.config, tmp_path / "plain")
    with pytest.raises(InputError, match=r"holds no classifier \(head.weight\)"):
        initialise(pair(init=str(plain))[1], backbone, ANIMALS, list)


# What trains ----------------------------------------------------------------------------------------------------


def test_layer_decay_counts_the_token_to_the_stem_and_both_layers_to_the_head(tmp_path):
    groups = parameter_groups(distillation(tmp_path), layer_decay=0.5)
    scale = {name: (group.lr_scale, group.decayed) for group in groups for name in group.names}
    assert scale["backbone.model.dist_token"] == scale["backbone.model.cls_token"] == (0.125, False)
    assert scale["backbone.model.patch_embed.proj.weight"] == (0.125, True)
    assert scale["backbone.model.blocks.1.mlp.fc1.weight"] == (0.5, True)
    assert scale["backbone.model.norm.weight"] == (1.0, False)
    assert scale["head.linear.weight"] == scale["head.second.weight"] == (1.0, True)
    assert scale["head.second.bias"] == (1.0, False)


def test_patches_are_dropped_and_never_a_token():
    config = Drop.Config(patch=0.75, path=0.3)
    arguments = config.timm_arguments(TOKEN["name"])
    torch.manual_seed(0)
    backbone = Backbone(Backbone.Config(**{**TOKEN, "options": {**OPTIONS, **arguments}})).train()
    drop = Drop(config, backbone.model)
    assert drop.rates()["path"] == [pytest.approx(0.3)] * 2 and drop.rates()["patch"] == [0.75]
    tokens = torch.arange(18.0)[None, :, None].expand(64, -1, -1)
    kept = backbone.model.patch_drop(tokens)[..., 0]
    assert kept.shape == (64, 2 + 4) and (kept[:, 0] == 0).all() and (kept[:, 1] == 1).all()
    assert len(kept[:, 2:].unique()) == 16


@pytest.mark.parametrize("name", TRANSFERS.names())
def test_every_transfer_trains_both_layers(tmp_path, name):
    task = distillation(tmp_path)
    kind = TRANSFERS.get(name)
    transfer = kind(kind.Config(**({"at": ["40%"]} if name == "gradual" else {})))
    transfer.prepare(task, Clock(10, 8, 80))
    task.train(), transfer.set_mode(task, 0)
    batch = batch_of()
    task(batch, {"labels": 0.5, "hard_labels.weight": 0.5, **dict.fromkeys(MIXES, 0.0)}).loss.backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in task.head.layers)
    token = task.backbone.model.dist_token
    assert (token.grad is not None) == (name in ("full", "gradual"))
    assert len(transfer.opens(task, Clock(10, 8, 80))) == (name == "gradual") * len(list(task.backbone.parameters()))
    with torch.no_grad():
        task.eval()
        want = task.logits(batch.views[0])
        state = transfer.merged(task.state_dict())
        folder = export_classifier(state, task.backbone.config, task.head.config, tmp_path / "x", CLASSES)
        torch.testing.assert_close(load_classifier(folder)(batch.views[0]), want, rtol=1e-4, atol=1e-4)


def test_the_agreement_is_that_of_the_tokens_answer(tmp_path):
    task, batch = distillation(tmp_path), batch_of()
    knobs = {"labels": 0.5, "hard_labels.weight": 0.5, **dict.fromkeys(MIXES, 0.0)}
    output = task(Batch(batch.views, batch.labels, batch.weights, batch.positions), knobs)
    images = task.backbone.normalize(batch.views[0])
    _, taught = task.head.both(task.backbone(images))
    its = task.apart.teacher(images, task.backbone).logits
    assert output.metrics["agreement"].item() == pytest.approx(100 * (taught.argmax(1) == its.argmax(1)).float().mean())
