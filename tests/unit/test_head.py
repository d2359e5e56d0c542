"""Heads: what they compute, what they start from, and that named classes keep their logits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import logistic
from finetune.head_init import initialise
from penstock import export
from penstock.backbones import Backbone, Features
from penstock.class_names import check_classes, imagenet_names, match_classes
from penstock.errors import InputError
from penstock.evaluate._features import FeatureSet, extract
from penstock.head import Head
from penstock.streams.batch import Batch
from tests.unit.test_export import VIT, made

CNN = {"name": "test_resnet", "size": 32}
ANIMALS = ("ant", "Great White", "cat", "dog")


def head_of(backbone: Backbone, classes: int = 4, **fields: Any) -> Head:
    torch.manual_seed(0)
    return Head(Head.Config(**fields), backbone.dim, classes, backbone)


def images_of(backbone: Backbone, count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, *backbone.size), dtype=torch.uint8)


def no_images() -> Any:
    raise AssertionError("no training image is needed")


def classifier(tmp_path: Path, fields: dict[str, Any], classes: tuple[str, ...], **head: Any) -> tuple[Path, Backbone]:
    """The export of a classifier with random weights, and its backbone."""
    backbone = made(fields)
    module = head_of(backbone, len(classes), **head)
    nn.init.normal_(module.linear.bias)
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in module.state_dict().items()}
    folder = tmp_path / "classifier"
    return export.export_classifier(state, backbone.config, module.config, folder, classes), backbone


# What heads compute


def test_a_linear_head_starts_small_and_with_a_prior() -> None:
    backbone = made({**VIT, "size": 16})
    head = head_of(backbone, classes=1000, init_std=2e-5, bias="prior")
    assert head.linear.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert torch.equal(head.linear.bias, torch.full((1000,), -math.log(1000)))
    assert not head_of(backbone, init_std=0).linear.weight.any() and not head_of(backbone).linear.bias.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert head(backbone(images_of(backbone))).dtype == torch.float32


def test_the_batch_norm_of_maes_linear_probe() -> None:
    """As in the paper's code: BatchNorm1d without scale and shift, eps 1e-6, in front of the linear layer."""
    backbone = made(CNN)
    head = head_of(backbone, norm="batch")
    reference = nn.Sequential(nn.BatchNorm1d(backbone.dim, affine=False, eps=1e-6), nn.Linear(backbone.dim, 4))
    reference[1].load_state_dict(head.linear.state_dict())
    with torch.no_grad():
        for _ in range(3):
            features = Features(torch.randn(8, backbone.dim) * 3 + 1, torch.empty(0))
            torch.testing.assert_close(head(features), reference(features.pooled))
        head.eval(), reference.eval()
        torch.testing.assert_close(head(features), reference(features.pooled))
        weight, bias = head.folded() or (None, None)
        torch.testing.assert_close(features.pooled @ weight.T + bias, reference(features.pooled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{**VIT, "size": 16}, CNN, {"name": "mobilenetv3_small_050", "size": 64}])
def test_an_attentive_head_sees_every_position(fields: dict[str, Any]) -> None:
    backbone = made(fields)
    head = head_of(backbone, kind="attentive", heads=4, norm="layer", init_std=1.0)
    nn.init.normal_(head.pool.attend.latent)
    features = backbone(images_of(backbone))
    spatial = features.spatial.detach().clone().requires_grad_()
    logits = head(Features(features.pooled, spatial))
    logits.square().sum().backward()
    touched = spatial.grad.abs().sum(-1 if backbone.kind == "tokens" else 1)
    assert logits.shape == (4, 4) and (touched > 0).all()
    tokens = spatial if backbone.kind == "tokens" else spatial.flatten(2).transpose(1, 2)
    shuffled = tokens[:, torch.randperm(tokens.shape[1])]  # attention knows no order
    torch.testing.assert_close(head(Features(features.pooled, shuffled)), logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="5 heads do not divide"):
        head_of(backbone, kind="attentive", heads=5)


# By class name


def test_named_classes_keep_their_logits_in_another_order(tmp_path: Path) -> None:
    folder, backbone = classifier(tmp_path, CNN, ANIMALS)
    old = export.load_classifier(folder)
    classes = ["DOG", "elk", "great-white", "ant"]
    head = head_of(backbone, init=str(folder))
    fresh = {name: value.clone() for name, value in head.state_dict().items()}
    said = initialise(head, backbone, classes, no_images)
    images = images_of(backbone)
    with torch.no_grad():
        before, now = old(images), head(backbone(images))
    assert torch.equal(now[:, [0, 2, 3]], before[:, [3, 1, 0]])
    assert torch.equal(head.linear.weight[1], fresh["linear.weight"][1]) and head.linear.bias[1] == 0
    assert said.startswith("the head starts with 3 of 4 classes of ") and said.endswith("random weights: elk")


def test_a_classifier_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder, backbone = classifier(tmp_path, CNN, ANIMALS)
    with pytest.raises(InputError, match=r"none of the 2 classes \(oak, fir\) is among those of .*ant, Great White"):
        initialise(head_of(backbone, 2, init=str(folder)), backbone, ["oak", "fir"], no_images)
    with pytest.raises(InputError, match=r"head.norm: layer here, but none in the classifier"):
        initialise(head_of(backbone, norm="layer", init=str(folder)), backbone, ANIMALS, no_images)
    other = made({**VIT, "size": 16})
    with pytest.raises(InputError, match="one of 96 features, this backbone gives 48"):
        initialise(head_of(other, init=str(folder)), other, ANIMALS, no_images)
    plain = export.export_backbone(backbone.state_dict(), backbone.config, tmp_path / "plain")
    with pytest.raises(InputError, match=r"holds no classifier \(fc.weight\)"):
        initialise(head_of(backbone, init=str(plain)), backbone, ANIMALS, no_images)
    with pytest.raises(ValueError, match="there is no classifier at '/nowhere'"):
        Head.Config(init="/nowhere")
    with pytest.raises(InputError, match=r"backbone.weights, but that is null"):
        initialise(head_of(backbone, init="weights"), backbone, ANIMALS, no_images)


def test_an_attentive_classifier_starts_another(tmp_path: Path) -> None:
    folder, backbone = classifier(tmp_path, CNN, ANIMALS, kind="attentive", heads=4)
    head = head_of(backbone, 2, kind="attentive", heads=4, init=str(folder))
    nn.init.normal_(head.pool.attend.latent)
    initialise(head, backbone, ["dog", "ant"], no_images)
    images = images_of(backbone)
    with torch.no_grad():
        want = export.load_classifier(folder)(images)[:, [3, 0]]
        torch.testing.assert_close(head.eval()(backbone(images)), want)
    with pytest.raises(InputError, match=r"head.kind: linear here, but attentive in the classifier"):
        initialise(head_of(backbone, 2, init=str(folder)), backbone, ["dog", "ant"], no_images)


def test_a_published_imagenet_classifier_by_synset_and_by_name(tmp_path: Path) -> None:
    backbone = made(CNN)
    weight, bias = torch.randn(1000, backbone.dim), torch.randn(1000)
    tensors = {**backbone.model.state_dict(), "fc.weight": weight, "fc.bias": bias}
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "r.pth")
    loaded = Backbone(Backbone.Config(**CNN, weights=str(tmp_path / "r.pth"))).eval()
    synsets = imagenet_names(1000)
    head = head_of(loaded, 3, init="weights")
    said = initialise(head, loaded, ["n02391049", "goldfish", "unicorn"], no_images)
    rows = [synsets.index("n02391049"), 1]
    assert torch.equal(head.linear.weight[:2], weight[rows]) and torch.equal(head.linear.bias[:2], bias[rows])
    assert said.endswith("unicorn")


def test_names_match_up_to_their_spelling() -> None:
    assert match_classes(["b c", "A", "z"], ["a", "B_C"]) == {0: 1, 1: 0}
    assert match_classes(["a-b"], ["A B", "a_b"]) == {}  # which one is meant?
    synsets = imagenet_names(1000)
    assert imagenet_names(10) is None
    # Two of ImageNet's classes are called crane, so the name alone says neither; a synset does.
    assert match_classes(["crane", "tench", "Tinca tinca"], synsets).keys() == {1, 2}
    cranes = [label for label, name in enumerate(synsets) if name in ("n02012849", "n03126707")]
    assert match_classes(["n03126707", "n02012849"], synsets) == {0: cranes[1], 1: cranes[0]}
    assert match_classes(["n03126707"], ["n02012849"]) == {}
    assert match_classes(["n01443537"], ["goldfish"]) == {0: 0}


def test_classes_of_data_and_classifier_are_compared() -> None:
    check_classes(("a", "b"), ["a", "b"], "data/val")
    with pytest.raises(InputError, match="has 2 classes and data/val has 3; 'c' is in one"):
        check_classes(("a", "b"), ("a", "b", "c"), "data/val")
    with pytest.raises(InputError, match="the same classes in another order: label 1 is 'c' there and 'b'"):
        check_classes(("a", "b", "c"), ("a", "c", "b"), "data/val")
    with pytest.raises(InputError, match="data/val has other classes: label 0 is 'x' there"):
        check_classes(("a", "b"), ("x", "b"), "data/val")


# From a probe


def labelled(backbone: Backbone, count: int, classes: int) -> list[Batch]:
    """Batches whose images are brighter in one channel or corner for each class."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 120, (count, 3, *backbone.size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    for row, label in enumerate(labels.tolist()):
        pixels[row, label % 3, label // 3 * 8 :] += 80
    return [
        Batch([pixels[a : a + 16]], labels[a : a + 16], torch.ones(16), torch.arange(a, a + 16))
        for a in range(0, count, 16)
    ]


@pytest.mark.parametrize("fields", [{**VIT, "size": 16}, CNN])
def test_a_probed_head_gives_the_probes_logits(fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = Backbone(Backbone.Config(**fields)).train()
    batches = labelled(backbone, 96, 4)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    head = head_of(backbone, 5, init="probe")
    said = initialise(head, backbone, ["a", "b", "c", "d", "never"], lambda: batches)
    assert backbone.training and all(torch.equal(v, before[n]) for n, v in backbone.state_dict().items())
    features = extract(backbone, batches, torch.device("cpu"))
    probe = logistic.fit(features, 5)
    with torch.no_grad():
        got = head(Features(features.features, torch.empty(0)))
    torch.testing.assert_close(got, probe(features.features), rtol=1e-3, atol=1e-3)
    right = (got.argmax(1) == features.labels).double().mean().item()
    assert right > 0.9 and f"{100 * right:.1f} % right" in said and "96 training images" in said


def lopsided(count: int = 400, classes: int = 4, dim: int = 24, seed: int = 0) -> FeatureSet:
    """Features far from 0, of which most dimensions hardly vary, yet tell the classes apart as the others do."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    scale = torch.cat([torch.ones(8), torch.full((dim - 8,), 1e-3)])
    rows = (centres[labels] + 0.8 * torch.randn(count, dim, generator=draw)) * scale + 3
    return FeatureSet(rows, labels, torch.arange(count))


def test_the_probe_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    train = lopsided()
    probe = logistic.fit(train, 4)
    x = train.features.double()
    deviation = x.var(0, correction=0).mean().sqrt()
    theirs = LogisticRegression(C=1 / (probe.penalty * len(x)), tol=1e-8, max_iter=5000)
    theirs.fit(((x - x.mean(0)) / deviation).numpy(), train.labels.numpy())
    weight = torch.from_numpy(theirs.coef_) / deviation
    torch.testing.assert_close(probe.weight.double(), weight, rtol=1e-3, atol=1e-3 * weight.abs().max().item())
    want = torch.from_numpy(theirs.decision_function(((x - x.mean(0)) / deviation).numpy()))
    got = probe(train.features).double()
    torch.testing.assert_close(got - got.mean(1, True), want - want.mean(1, True), rtol=1e-3, atol=2e-3)


def test_the_penalty_is_the_strongest_within_a_point() -> None:
    """Against scikit-learn's accuracy on the held-out tenth at every penalty."""
    from sklearn.linear_model import LogisticRegression

    from penstock.evaluate._features import keyed_order

    train = lopsided(600, seed=3)
    order, rows = keyed_order(train, 0), train.features.double()
    x = ((rows - rows.mean(0)) / rows.var(0, correction=0).mean().sqrt()).numpy()
    held, rest = order[:60].numpy(), order[60:].numpy()
    tops = {}
    for penalty in logistic.PENALTIES:
        fitted = LogisticRegression(C=1 / (penalty * len(rest)), tol=1e-6, max_iter=5000)
        tops[penalty] = 100 * fitted.fit(x[rest], train.labels[rest]).score(x[held], train.labels[held])
    fits = [penalty for penalty, top in tops.items() if top >= max(tops.values()) - 1]
    assert logistic.fit(train, 4).penalty == max(fits)
    assert len({round(top) for top in tops.values()}) > 1  # else any would do


def test_large_sets_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    train = lopsided(100)
    whole = logistic.minimum(train.features, train.labels, 0.1, torch.zeros(25, 4, dtype=torch.float64))
    monkeypatch.setattr(logistic, "ROWS", 33)
    parts = logistic.minimum(train.features, train.labels, 0.1, torch.zeros(25, 4, dtype=torch.float64))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_the_first_steps_of_finetuning_leave_the_probe_alone() -> None:
    """Weights folded back from standardised features are in the hundreds here, and lose everything in five steps."""
    train, val = lopsided(), lopsided(seed=1)

    def top(weight: Tensor, bias: Tensor) -> tuple[float, float]:
        """Accuracy on other samples, before and after five steps of all weights."""
        backbone, head = nn.Linear(24, 24), nn.Linear(24, 4)
        with torch.no_grad():
            backbone.weight.copy_(torch.eye(24)), backbone.bias.zero_()
            head.weight.copy_(weight), head.bias.copy_(bias)
        module = nn.Sequential(backbone, head)
        optimizer, found = torch.optim.AdamW(module.parameters(), lr=1e-3), []
        for step in range(6):
            found.append((module(val.features).argmax(1) == val.labels).double().mean().item())
            rows = slice(32 * step, 32 * step + 32)
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(train.features[rows]), train.labels[rows]).backward()
            optimizer.step()
        return found[0], found[-1]

    probe = logistic.fit(train, 4)
    before, after = top(probe.weight, probe.bias)
    assert probe.weight.norm() < 20 and before > 0.8 and after > before - 0.03
    deviation, mean = torch.std_mean(train.features, 0)
    standard = logistic.minimum(
        (train.features - mean) / deviation, train.labels, 1e-6, torch.zeros(25, 4, dtype=torch.float64)
    ).float()
    weight = standard[:-1].T / deviation
    before, after = top(weight, standard[-1] - weight @ mean)
    assert weight.norm() > 500 and before > 0.8 and after < before - 0.3


def test_a_probe_wants_a_linear_head_and_labels() -> None:
    backbone = made(CNN)
    batches = labelled(backbone, 32, 4)
    with pytest.raises(InputError, match=r"head.norm: batch cannot start from probe"):
        initialise(head_of(backbone, norm="batch", init="probe"), backbone, ANIMALS, no_images)
    with pytest.raises(InputError, match=r"head.kind: attentive cannot start"):
        initialise(head_of(backbone, kind="attentive", init="probe"), backbone, ANIMALS, no_images)
    with pytest.raises(InputError, match="label 3 is out of range: there are 2 classes"):
        initialise(head_of(backbone, 2, init="probe"), backbone, ["a", "b"], lambda: batches)
    one = [Batch([b.views[0][:1]], b.labels[:1], b.weights[:1], b.positions[:1]) for b in batches[:1]]
    with pytest.raises(InputError, match="at least 2 labelled training images"):
        initialise(head_of(backbone, init="probe"), backbone, ANIMALS, lambda: one)
