"""Distillation: what the teacher sees, that it is no part of what is trained, and what the loss is made of."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.losses.cross_entropy import CrossEntropy
from finetune.recipe import Finetune
from finetune.run import Finetuning
from finetune.tasks import Pieces
from finetune.tasks.classify import Classify
from finetune.tasks.distill import Distill
from finetune.teachers import load_teacher
from finetune.transfer.full import Full
from penstock.backbones import Backbone
from penstock.backbones.batchnorm import BatchNorms
from penstock.backbones.dropout import Drop
from penstock.checkpoint import Checkpoints
from penstock.ema import Average
from penstock.engine import Engine
from penstock.errors import InputError
from penstock.export import export_classifier, load_classifier
from penstock.head import Head
from penstock.mixing import Mixing
from penstock.optim import Optim
from penstock.recipe import Source, check
from penstock.schedule import Clock, Curves
from penstock.streams.batch import Batch
from tests.shards import write_set

CLASSES = ("cat", "dog", "owl")
VIT = {"name": "vit_tiny_patch16_224", "size": 16, "options": {"patch_size": 4, "embed_dim": 24, "depth": 2}}
VIT["options"] |= {"num_heads": 2}  # type: ignore[operator]
CNN = {"name": "test_resnet", "size": 16}
OTHER = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
MIXES = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0}
SHARE, HEAT = "soft_targets.weight", "soft_targets.temperature"
KNOBS = {"labels": 0.5, SHARE: 0.5, HEAT: 2.0, **dict.fromkeys(MIXES, 0.0)}


def model(seed: int, backbone: dict[str, Any]) -> tuple[Backbone, Head]:
    torch.manual_seed(seed)
    made = Backbone(Backbone.Config(**backbone))
    made.model = BatchNorms(BatchNorms.Config()).apply(made.model)
    return made, Head(Head.Config(init_std=0.5), made.dim, len(CLASSES), made)


def teacher(folder: Path, seed: int = 7, classes: tuple[str, ...] = CLASSES, **backbone: Any) -> Path:
    made, head = model(seed, backbone)
    state = {f"backbone.{n}": v for n, v in made.state_dict().items()}
    state |= {f"head.{n}": v for n, v in head.state_dict().items()}
    return export_classifier(state, made.config, Head.Config(), folder / "teacher", classes)


def task_of(kind: type[Classify], folder: Path | None, student: dict[str, Any] = VIT, **pieces: Any) -> Any:
    backbone, head = model(1, student)
    made = Pieces(
        backbone=backbone,
        head=head,
        loss=CrossEntropy(CrossEntropy.Config(smoothing=0.1)),
        mixing=Mixing(Mixing.Config(mixup=0.8, cutmix=1.0, mode="sample"), seed=3),
        drop=Drop(Drop.Config(), backbone.model, head.drop),
        transfer=Full(Full.Config()),
        classes=CLASSES,
        mixes=True,
        **({"sizes": (16,)} | pieces),
    )
    return kind(Distill.Config(teacher=str(folder)) if kind is Distill else Classify.Config(), made)


def batch_of(positions: range | list[int] = range(8), side: int = 16, bad: tuple[int, ...] = ()) -> Batch:
    """Images that are a function of their positions."""
    rows = [torch.Generator().manual_seed(int(p)) for p in positions]
    images = torch.stack([torch.randint(0, 256, (3, side, side), generator=row, dtype=torch.uint8) for row in rows])
    where = torch.tensor(list(positions))
    weights = torch.tensor([float(p not in bad) for p in positions])
    return Batch([images], where % 3, weights, where)


def relabelled(batch: Batch) -> Batch:
    return Batch(batch.views, (batch.labels + 1) % 3, batch.weights, batch.positions)


def seen(task: Distill, batch: Batch, **knobs: float) -> tuple[Tensor, Tensor]:
    """What student and teacher are given in a step, as their own normalised images."""
    found: dict[str, Tensor] = {}
    for name, module in (("student", task.backbone), ("teacher", task.apart.teacher.network.backbone)):
        module.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0].clone()}))
    task(batch, KNOBS | knobs)
    return found["student"], found["teacher"]


def pixels(images: Tensor, backbone: Backbone) -> Tensor:
    return 255 * (images.double() * backbone.std[:, None, None] + backbone.mean[:, None, None])


def gradients(task: Classify, batch: Batch, **knobs: float) -> tuple[float, dict[str, Tensor]]:
    task.zero_grad()
    loss = task(batch, KNOBS | knobs).loss
    loss.backward()
    return loss.item(), {name: param.grad.clone() for name, param in task.named_parameters()}


def same(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> bool:
    return first[0] == second[0] and all(torch.equal(value, second[1][name]) for name, value in first[1].items())


# What the teacher sees ------------------------------------------------------------------------------------------


def test_the_teacher_sees_the_very_pixels_in_its_own_normalisation(tmp_path):
    task, batch = task_of(Distill, teacher(tmp_path, **CNN, **OTHER)), batch_of()
    student, its = seen(task, batch)
    stored = batch.views[0]
    assert torch.equal(pixels(student, task.backbone).round().to(torch.uint8), stored)
    assert torch.equal(pixels(its, task.apart.teacher).round().to(torch.uint8), stored)
    assert (pixels(its, task.apart.teacher) - stored).abs().max() < 1e-3
    assert (its - student).abs().max() > 0.1


def test_mixed_images_are_mixed_alike(tmp_path):
    task, batch = task_of(Distill, teacher(tmp_path, **CNN, **OTHER)), batch_of()
    student, its = seen(task, batch, **MIXES)
    ours, theirs = pixels(student, task.backbone), pixels(its, task.apart.teacher)
    assert (ours - theirs).abs().max() < 1e-3
    assert ((ours - batch.views[0]).abs().amax((1, 2, 3)) > 1).all(), "the images were to be mixed"


def test_with_the_same_normalisation_it_is_the_same_tensor(tmp_path):
    student, its = seen(task_of(Distill, teacher(tmp_path, **CNN)), batch_of(), **MIXES)
    assert torch.equal(student, its)


def test_a_teacher_made_for_another_size_answers_as_it_does_alone(tmp_path):
    task, batch = task_of(Distill, teacher(tmp_path, **VIT), CNN, sizes=(16, 24)), batch_of(side=24)
    images = task.backbone.normalize(batch.views[0])
    alone = load_classifier(tmp_path / "teacher")(batch.views[0])
    torch.testing.assert_close(task.taught(images, batch).logits, alone.detach())


@pytest.mark.parametrize(
    ("its", "sizes", "words"),
    [
        (VIT, (16, 18), r"made for 16 x 16 pixels, does not take the student's images of 18 x 18.*augment.size"),
        (
            {**VIT, "options": {**VIT["options"], "dynamic_img_size": False}},  # type: ignore[dict-item]
            (16, 24),
            "does not take the student's images of 24 x 24",
        ),
        ({**CNN, "channels": 1}, (16,), "images of 1 channels, the student of 3"),
    ],
)
def test_a_teacher_that_cannot_see_the_images_is_refused_before_the_run(tmp_path, its, sizes, words):
    with pytest.raises(InputError, match=words):
        task_of(Distill, teacher(tmp_path, **its), sizes=sizes)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"the same classes in another order.*the teacher"):
        task_of(Distill, teacher(tmp_path, classes=("dog", "cat", "owl"), **CNN))


# What the teacher is not part of --------------------------------------------------------------------------------


def test_the_teacher_stays_in_eval_mode_without_gradients(tmp_path):
    task = task_of(Distill, teacher(tmp_path, **CNN)).train()
    before = copy.deepcopy(task.apart.teacher.state_dict())
    parts = list(task.apart.teacher.modules())
    output = task(batch_of(), KNOBS)
    output.loss.backward()
    assert not any(part.training for part in parts)
    assert all(param.grad is None and not param.requires_grad for param in task.apart.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.apart.teacher.state_dict().items())
    answer = task.taught(task.backbone.normalize(batch_of().views[0]), batch_of())
    assert not answer.logits.requires_grad and not answer.pooled.requires_grad


def parts_without_a_teacher(rank: int, world: int, folder: str, store: str) -> tuple[bool, bool, set[str], list[int]]:
    task = task_of(Distill, Path(folder))
    teacher = task.apart.teacher
    theirs = {id(param) for param in teacher.parameters()}
    average = Average(Average.Config(name="ema"), task)
    optimizer = Optim(Optim.Config(lr=1e-2)).build(task, 8)
    engine = Engine(task, optimizer, Engine.Config(zero=1, precision="fp32"), 8 // world)
    held = {id(param) for group in engine.groups for param in group["params"]}
    # The averaged copy shares the teacher: a second one would be memory for nothing.
    shared = average.module.apart.teacher is teacher
    checkpoints = Checkpoints(Checkpoints.Config(), Path(store))
    checkpoints.save(engine, 1, {}, average=average)
    elements = [sum(v.numel() for v in named.values()) for named in (engine.weights(), average.weights())]
    return shared, not theirs & held, set(engine.weights()) | set(average.weights()), elements


def test_engine_optimizer_average_and_checkpoint_hold_the_student_alone(tmp_path, ranks):
    folder, student = teacher(tmp_path, **CNN), task_of(Classify, None)
    for shared, apart, names, elements in ranks(2).run(parts_without_a_teacher, str(folder), str(tmp_path / "run")):
        assert shared and apart and names == set(student.state_dict())
        assert elements == [sum(value.numel() for value in student.state_dict().values())] * 2
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert files and not any(b"teacher" in file.read_bytes() for file in files)


def test_the_students_batch_norm_does_not_see_the_teacher(tmp_path):
    """The teacher is the student's own kind of network: whatever leaked would fit."""
    folder = teacher(tmp_path, **CNN)
    plain, taught = task_of(Classify, None, CNN).train(), task_of(Distill, folder, CNN).train()
    for task in (plain, taught):
        for first in (0, 8):
            task(batch_of(range(first, first + 8), bad=(first,)), KNOBS)
    moved = dict(plain.named_buffers())
    assert any("running_mean" in name and value.abs().max() > 0 for name, value in moved.items())
    assert all(torch.equal(value, moved[name]) for name, value in taught.named_buffers())


# The loss -------------------------------------------------------------------------------------------------------


def test_with_labels_at_0_they_are_not_used(tmp_path):
    task, batch = task_of(Distill, teacher(tmp_path, **CNN)), batch_of()
    alone = {"labels": 0.0, **MIXES}
    assert same(gradients(task, batch, **alone), gradients(task, relabelled(batch), **alone))
    assert not same(gradients(task, batch, labels=0.1), gradients(task, relabelled(batch), labels=0.1))


def test_with_weight_0_it_is_plain_classification(tmp_path):
    task, plain = task_of(Distill, teacher(tmp_path, **CNN)), task_of(Classify, None)
    batch = batch_of(bad=(3,))
    assert same(gradients(task, batch, **MIXES, labels=1.0, **{SHARE: 0.0}), gradients(plain, batch, **MIXES))
    assert not same(gradients(task, batch, **MIXES, labels=1.0, **{SHARE: 0.1}), gradients(plain, batch, **MIXES))


def loss_by_hand(task: Distill, batch: Batch, weight: float, temperature: float) -> float:
    """Sample by sample, in plain Python."""
    student = task.logits(batch.views[0]).tolist()
    taught = task.taught(task.backbone.normalize(batch.views[0]), batch).logits.tolist()
    total = 0.0
    for ours, its, label in zip(student, taught, batch.labels.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in logits] for logits in (its, ours))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        teaching = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        plain = [math.exp(x) for x in ours]
        target = [0.9 * (k == label) + 0.1 / 3 for k in range(3)]
        labels = -sum(t * math.log(x / sum(plain)) for t, x in zip(target, plain, strict=True))
        total += (1 - weight) * labels + weight * teaching
    return total / len(student)


def test_weight_and_temperature_follow_curves(tmp_path):
    folder = teacher(tmp_path, **CNN)
    write_set(tmp_path / "set", [3])
    recipe = check(
        Finetune,
        Source(
            values={
                "name": "run",
                "duration": "10 steps",
                "batch": 2,
                "data": {"train": str(tmp_path / "set"), "val": str(tmp_path / "set")},
                "augment": {"name": "none", "size": 16},
                "backbone": VIT,
                "optim": {"lr": 0.1},
                "task": {
                    "name": "distill",
                    "teacher": str(folder),
                    "labels": {"name": "linear", "start": 0.0, "end": 1.0},
                    "losses": {
                        "soft_targets": {
                            "weight": {"name": "linear", "start": 1.0, "end": 0.0},
                            "temperature": {"name": "linear", "start": 4.0, "end": 1.0},
                        }
                    },
                },
            }
        ),
    )
    curves, task, batch = Curves(Finetuning(recipe).knobs(), Clock(10, 2, 3), {}), task_of(Distill, folder), batch_of()
    for step, weight, temperature in ((0, 1.0, 4.0), (5, 0.5, 2.5), (9, 0.1, 1.3)):
        found = task(batch, curves.at(step, 2)).loss.item()
        assert found == pytest.approx(loss_by_hand(task, batch, weight, temperature), rel=1e-5)


@pytest.mark.parametrize("value", [-0.5, {"name": "linear", "start": 0.5, "end": -0.5}])
def test_values_without_meaning_are_refused_by_the_check(tmp_path, value):
    with pytest.raises(ValueError, match="labels"):
        Distill.Config(teacher=str(tmp_path), labels=value)


# Ranks ----------------------------------------------------------------------------------------------------------


def distilled(rank: int, world: int, folder: str, student: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps of 8 samples, which the ranks take in turn; one sample of the second step cannot be read."""
    task = task_of(Distill, Path(folder), student)
    # Adam would make a step of the rounding errors that are a key bias's gradient; larger steps multiply errors a
    # hundredfold each, through batch norm over eight samples.
    optimizer = Optim(Optim.Config(name="momentum", lr=2e-3)).build(task, 8)
    engine = Engine(task, optimizer, Engine.Config(precision="fp32"), 8 // world)
    losses = []
    for step in range(3):
        engine.set({"lr": 2e-3, "weight_decay": 0.05})
        batch = batch_of(range(8 * step + rank, 8 * step + 8, world), bad=(11,))
        engine.begin(batch.weights.sum())
        output = engine.forward(batch, KNOBS | MIXES)
        engine.backward(output)
        assert engine.step().applied
        losses.append(float(output.loss.detach() * output.weight))
    return losses, engine.weights()


@pytest.mark.parametrize("student", [VIT, CNN], ids=["vit", "cnn"])
def test_two_ranks_learn_what_one_process_does(tmp_path, ranks, student):
    folder = str(teacher(tmp_path, **CNN, **OTHER))
    ((losses, alone),) = ranks(1).run(distilled, folder, student)
    (first, one), (second, two) = ranks(2).run(distilled, folder, student)
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx(losses, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-3)
    start = task_of(Classify, None, student).state_dict()
    assert max((value - start[name]).abs().max().item() for name, value in alone.items()) > 1e-3
    for name, value in alone.items():
        torch.testing.assert_close(
            one[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert torch.equal(one[name], two[name]), name


# Features -------------------------------------------------------------------------------------------------------


def taught_by_features(rank: int, world: int, folder: str, precision: str) -> tuple[bool, float, list[int]]:
    """A step of losses that look inside both networks, with batch norm over the ranks."""
    # Larger images: where a map is 1 x 1, torch's bf16 convolutions on CPUs give weights gradients of NaN now and then.
    backbone, head = model(1, {**CNN, "size": 32})
    pieces = task_of(Distill, Path(folder), CNN, sizes=(32,)).pieces
    config = Distill.Config(
        teacher=folder, losses={"attention": {"last": 2}, "features": {"on": "stages"}, "relational": {}}
    )
    task = Distill(config, Pieces(**{**vars(pieces), "backbone": backbone, "head": head}))
    engine = Engine(task, Optim(Optim.Config(lr=1e-3)).build(task, 8), Engine.Config(precision=precision), 8 // world)
    engine.set({"lr": 1e-3, "weight_decay": 0.0})
    batch = batch_of(range(rank, 8, world), side=32)
    engine.begin(batch.weights.sum())
    knobs = Distill.knobs(config)
    output = engine.forward(batch, {**dict.fromkeys(MIXES, 0.0), **knobs})
    engine.backward(output)
    widths = [project.out_features for project in task.losses["features"].projectors]
    done = engine.step()
    return done.applied, float(output.loss.detach()), widths


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_look_inside_cnns_with_batch_norm_over_ranks(tmp_path, ranks, precision):
    folder = str(teacher(tmp_path, **CNN, **OTHER))
    for applied, loss, widths in ranks(2).run(taught_by_features, folder, precision):
        assert applied and math.isfinite(loss) and widths == [model(1, CNN)[0].spatial_dim]


def test_a_projector_works_in_the_precision_of_its_weights():
    from finetune.distillation import Answer, Widths
    from finetune.distillation.features import Features

    loss = Features(Features.Config(), Widths(3, 4), Widths(3, 5)).bfloat16()
    student, taught = (Answer(torch.randn(2, 3), torch.randn(2, width)) for width in (4, 5))
    found = loss(student, taught, torch.zeros(2, 3), torch.ones(2), {})
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_equal_weights_of_another_network_are_another_teacher(tmp_path):
    plain = load_teacher(str(teacher(tmp_path / "a", **VIT)), CLASSES, 3, [16])
    other = {**VIT, "options": {**VIT["options"], "act_layer": "quick_gelu"}}  # type: ignore[dict-item]
    quick = load_teacher(str(teacher(tmp_path / "b", **other)), CLASSES, 3, [16])
    again = load_teacher(str(teacher(tmp_path / "c", **VIT)), CLASSES, 3, [16])
    ours, theirs = plain.network.state_dict(), quick.network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert plain.digest() == again.digest() != quick.digest()
