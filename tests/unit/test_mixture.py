"""Mixtures: what is served against slow walks, classes, and refusals; promises 1 and 2 over several sets."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.augment.crop_flip import CropFlip
from penstock.augment.none import NoAugmentation
from penstock.errors import InputError
from penstock.recipe import Block, Source, check
from penstock.schedule import Clock, Linear, Step
from penstock.streams.data import Data
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from penstock.streams.positions.digest import digest_of
from penstock.streams.positions.mixture import labelled
from penstock.streams.positions.mixture_shares import Shares
from penstock.streams.positions.where import places
from penstock.streams.sets.manifest import Manifest
from penstock.streams.train import TrainStream
from tests.shards import damage, key_of, number_of, write_set

SIZES = {"big": [20, 3, 0, 18], "small": [7], "wide": [9, 8]}  # 41, 7 and 17 samples
COUNTS = {name: sum(sizes) for name, sizes in SIZES.items()}
GOLDEN = Path(__file__).with_name("golden_mixture_v1.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {name: Path(write_set(root / name, sizes, label=lambda n: n % 3).root) for name, sizes in SIZES.items()}


def stream(folders, augment=None, *, batch=24, accumulation=1, rank=0, world=1, seed=0, total=100, sets=None, **data):
    given = {name: {"weight": 1.0} for name in folders} if sets is None else sets
    train = {name: {"set": folders[name], **options} for name, options in given.items()}
    return TrainStream(
        Data.Config(train=train, **({"workers": 0, "lanes": 4} | data)),
        augment or NoAugmentation(NoAugmentation.Config(size=8)),
        batch=batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
        seed=seed,
        clock=Clock(total, batch, sum(COUNTS.get(name, 9) for name in given)),
    )


def take(stream: TrainStream, micros: int, since: int = 0):
    return list(islice(stream.batches(since), micros))


def served(batches) -> dict[int, tuple]:
    """(key, label, first pixel of the first view) by position."""
    return {
        position: (batch.keys[slot], int(batch.labels[slot]), batch.views[0][slot, :, 0, 0].tolist())
        for batch in batches
        for slot, position in enumerate(batch.positions.tolist())
    }


# Who has which row -----------------------------------------------------------------------------


def walked(tree: Any, shares: list[list[Fraction]], lengths: list[int]) -> list[int]:
    """The rows of `Shares`, one after the other: each node hands a row to its first part when that falls behind."""
    debts: dict[object, Fraction] = {}

    def weight(node: Any, stage: int) -> Fraction:
        return shares[stage][node] if isinstance(node, int) else weight(node[0], stage) + weight(node[1], stage)

    def deal(node: Any, stage: int) -> int:
        if isinstance(node, int):
            return node
        debts[node] = debts.get(node, Fraction(1, 2)) + weight(node[0], stage) / weight(node, stage)
        if debts[node] >= 1:
            debts[node] -= 1
            return deal(node[0], stage)
        return deal(node[1], stage)

    return [deal(tree, stage) for stage, length in enumerate(lengths) for _ in range(length)]


WEIGHTS = [[1, 1], [3, 1], [0.9, 0.1], [5, 3, 2], [1, 1, 1], [4, 3, 2, 1], [1, 10, 100, 3, 0.5], [1] * 9, [7]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_rows_are_dealt_as_a_walk_would(weights):
    """Odd denominators round a half down, so the walk may differ there by the order of two rows, not by counts."""
    rows, exact = 3000, [Fraction(repr(float(weight))) for weight in weights]
    shares = Shares([0], [[float(weight) for weight in weights]])
    sets, own = shares.owners(np.arange(rows))
    for number, share in enumerate(exact):
        counts = np.cumsum(sets == number)
        assert own[sets == number].tolist() == list(range(counts[-1]))
        slow = np.cumsum(np.array(walked(shares.tree, [exact], [rows])) == number)
        assert np.abs(slow - counts).max() <= 1
        off = [Fraction(int(count)) - share / sum(exact) * (row + 1) for row, count in enumerate(counts)]
        assert max(abs(each) for each in off) <= shares.most_off[number] + 1e-12
        windows = max([Fraction(0), *off]) - min([Fraction(0), *off])  # the most that any window [a, b) is off
        assert windows <= (1 if len(weights) <= 2 else 2 * shares.most_off[number])
    assert max(shares.most_off) < (1 if len(weights) <= 4 else 1.5)


def test_two_sets_are_within_one_row_in_every_window():
    rng = np.random.default_rng(0)
    for weight in [*rng.random(30).round(3), 1e-3, 1 / 3, 0.999]:
        sets, _ = Shares([0], [[float(weight), 1 - float(weight)]]).owners(np.arange(700))
        counts = np.concatenate([[0], np.cumsum(sets == 0)])
        for width in range(1, 200):
            windows = counts[width:] - counts[:-width]
            assert np.abs(windows - weight * width).max() <= 1 + 1e-9


def test_counts_hold_far_out_where_products_would_overflow():
    shares = Shares([0], [[1 / 3, 1.0, 0.123456789]])
    for row in (10**9, 10**12 + 7, 10**14):
        counts = shares.counts(row)
        assert sum(counts) == row
        total = Fraction(repr(1 / 3)) + 1 + Fraction("0.123456789")
        # Shares are fractions of up to 30 bits, so a set drifts by less than a row in 10^15.
        assert abs(counts[1] - row / total) < 2
        sets, own = shares.owners(np.arange(row, row + 50))
        for number in range(3):
            assert own[sets == number].tolist() == list(range(counts[number], counts[number] + (sets == number).sum()))


def test_weights_that_change_go_on_from_what_was_dealt():
    rng = np.random.default_rng(1)
    for trial in range(20):
        number, stages = int(rng.integers(2, 6)), 12
        weights = rng.random((stages, number)).round(2)
        weights[rng.random((stages, number)) < 0.2] = 0
        weights[:, int(rng.integers(number))] += 0.1
        starts = [0, *np.cumsum(rng.integers(1, 60, stages - 1)).tolist()]
        shares = Shares(starts, weights.tolist())
        rows = starts[-1] + 300
        sets, own = shares.owners(np.arange(rows))
        lengths = np.diff([*starts, rows]).tolist()
        target = np.zeros(number)
        for row in range(rows):
            stage = int(np.searchsorted(starts, row, side="right")) - 1
            assert weights[stage][sets[row]] > 0, (trial, row)
            target += weights[stage] / weights[stage].sum()
            counts = np.bincount(sets[: row + 1], minlength=number)
            if row % 7 == 0:
                assert shares.counts(row + 1) == counts.tolist()
            assert np.abs(counts - target).max() <= (0.5 + 1e-6 if number == 2 else 4)
        assert sum(lengths) == rows
        shuffled = rng.permutation(rows)
        again = shares.owners(shuffled)
        assert (again[0] == sets[shuffled]).all() and (again[1] == own[shuffled]).all()


# What a stream serves --------------------------------------------------------------------------


SETS: dict[str, Any] = {"big": {"weight": 3}, "small": {"weight": 1}, "wide": {"weight": 1.5}}


def test_each_set_is_served_in_epochs_of_its_own(folders):
    keys = [key for _, (key, _, _) in sorted(served(take(stream(folders, sets=SETS), 60)).items())]
    for name, total in COUNTS.items():
        mine = [key.removeprefix(f"{name}/") for key in keys if key.startswith(f"{name}/")]
        assert abs(len(mine) - len(keys) * SETS[name]["weight"] / 5.5) < 1
        for epoch in range(len(mine) // total):
            assert sorted(mine[epoch * total : (epoch + 1) * total]) == [key_of(n) for n in range(total)]
        assert mine[:total] != mine[total : 2 * total]


def test_pixels_labels_and_names_belong_together(folders):
    for batch in take(stream(folders, sets=SETS), 5):
        numbers = np.asarray(number_of(batch.views[0].numpy())).tolist()
        for slot, key in enumerate(batch.keys):
            name, _, own = key.partition("/")
            assert own == key_of(numbers[slot]) and name in COUNTS
            assert batch.labels[slot] == numbers[slot] % 3


@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_and_micro_batches_share_a_step(folders, repeats):
    alone = take(stream(folders, batch=72, sets=SETS, repeats=repeats), 8)
    for world, accumulation in [(2, 1), (3, 2), (8, 3)]:
        options = {"batch": 72, "sets": SETS, "repeats": repeats, "world": world, "accumulation": accumulation}
        found = [take(stream(folders, rank=rank, **options), 8 * accumulation) for rank in range(world)]
        for step, whole in enumerate(alone):
            parts = [b for batches in found for b in batches[step * accumulation : (step + 1) * accumulation]]
            assert {len(part) for part in parts} == {72 // world // accumulation} and {b.step for b in parts} == {step}
            assert served(parts) == served([whole])
        for micros in zip(*found, strict=True):  # every rank has its share of each set
            for name in COUNTS:
                mine = [sum(key.startswith(name) for key in batch.keys) for batch in micros]
                assert max(mine) - min(mine) <= 1


def test_a_rhythm_of_weights_is_none_of_the_ranks_or_of_half_a_batch(folders):
    """Sets that take turns would each fall to one of two ranks, and mixup would pair no two sets."""
    even: dict[str, dict] = {"big": {}, "wide": {}}
    pairs: Counter[tuple[str, str]] = Counter()
    for batch in take(stream(folders, batch=32, world=2, sets=even), 60):
        names = [key.partition("/")[0] for key in batch.keys]
        assert Counter(names) == {"big": 8, "wide": 8}
        pairs.update(zip(names[:8], names[8:], strict=True))
    assert min(pairs.values()) > 80 and len(pairs) == 4  # of 480


def test_chains_of_restarts_change_nothing(folders):
    curve = Linear(start=1.0, end=3.0).model_dump()
    sets = {"big": {"weight": curve}, "small": {}, "wide": {"weight": 2}}
    augment = CropFlip(CropFlip.Config(size=8))
    unbroken = served(take(stream(folders, augment, batch=48, total=40, sets=sets, repeats=2), 30))
    rng, position = np.random.default_rng(3), 0
    found: dict[int, tuple] = {}
    while position < 30 * 48:
        world, accumulation = [(1, 1), (2, 2), (3, 1), (4, 2), (6, 4)][int(rng.integers(5))]
        steps, options = int(rng.integers(1, 6)), {"world": world, "accumulation": accumulation, "repeats": 2}
        workers = int(rng.integers(0, 2))
        for rank in range(world):
            one = stream(folders, augment, batch=48, total=40, sets=sets, rank=rank, workers=workers, **options)
            found |= served(take(one, steps * accumulation, position))
        position += steps * 48
    assert {position: found[position] for position in unbroken} == unbroken


def test_weights_follow_a_curve_of_the_run(folders):
    """At the milestone one set takes over, at once, whatever was prefetched."""
    step = Step(start=1.0, milestones=["10 steps"], values=[0.0]).model_dump()
    other = Step(start=0.0, milestones=["10 steps"], values=[1.0]).model_dump()
    made = stream(folders, sets={"big": {"weight": step}, "wide": {"weight": other}}, workers=2, prefetch=4)
    for batch in take(made, 20):
        assert {key.partition("/")[0] for key in batch.keys} == {"big" if batch.step < 10 else "wide"}
    assert made.course.shares_of(0, 480) == pytest.approx(
        {"data/big_share": 0.5, "data/big_epoch": 240 / 41, "data/wide_share": 0.5, "data/wide_epoch": 240 / 17}
    )


def test_weights_on_a_curve_are_exact_in_every_prefix(folders):
    curve = Linear(start=4.0, end=0.0)
    made = stream(folders, sets={"big": {"weight": curve.model_dump()}, "wide": {}}, total=50)
    target, clock = 0.0, made.clock
    for position in range(50 * 24):
        weight = curve.at(position // 24, clock)
        target += weight / (weight + 1)
        assert abs(made.course.counts(position + 1)[0] - target) <= 0.5 + 1e-6


def test_three_weights_on_curves_stay_close(folders):
    falls, rises = Linear(start=3.0, end=0.1), Linear(start=0.0, end=2.0)
    sets = {"big": {"weight": falls.model_dump()}, "small": {"weight": rises.model_dump()}, "wide": {}}
    made, target = stream(folders, sets=sets, total=80), np.zeros(3)
    bound = max(made.course.shares.most_off) + 0.5
    for position in range(80 * 24):
        weights = np.array([falls.at(position // 24, made.clock), rises.at(position // 24, made.clock), 1.0])
        target += weights / weights.sum()
        assert np.abs(np.array(made.course.counts(position + 1)) - target).max() <= bound


def test_positions_and_stages_where_samples_are_repeated(folders):
    """A row that straddles two steps has the weights of the first."""
    curve = Linear(start=4.0, end=0.0)
    sets = {"big": {"weight": curve.model_dump()}, "wide": {}}
    made = stream(folders, sets=sets, total=50, batch=20, repeats=3)
    owners, target = [], 0.0
    for row in range(300):
        weight = curve.at(row * 3 // 20, made.clock)
        target += weight / (weight + 1)
        assert abs(made.course.counts(row + 1)[0] - target) <= 0.5 + 1e-6
        owners += [int(made.course.own(np.array([row]))[0][0])] * 3
    for position in range(900):
        assert made.course.positions(position) == np.bincount(owners[:position], minlength=2).tolist()


def test_the_golden_order_of_a_mixture(folders):
    """Checkpoints depend on it: a change needs a new MIXTURE_VERSION."""
    made = served(take(stream(folders, batch=24, seed=7, sets=SETS), 6))
    keys = [made[position][0] for position in range(144)]
    assert keys == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_order_of_sets_in_the_recipe_means_nothing(folders):
    even: dict[str, dict] = {name: {} for name in SETS}
    one, other = stream(folders, sets=even), stream(folders, sets=dict(reversed(even.items())))
    assert one.identity == other.identity and one.manifest.shards == other.manifest.shards
    assert served(take(one, 3)) == served(take(other, 3))


def test_a_mixture_of_one_set_and_sets_left_out(folders):
    train = {"big": {"set": folders["big"]}, "small": None}
    made = TrainStream(
        Data.Config(train=train, workers=0),
        NoAugmentation(NoAugmentation.Config(size=8)),
        batch=41,
        accumulation=1,
        rank=0,
        world=1,
        seed=0,
        clock=Clock(3, 41, 41),
    )
    (batch,) = take(made, 1)
    assert sorted(batch.keys) == [f"big/{key_of(n)}" for n in range(41)]


# Other parts of a stream -----------------------------------------------------------------------


def test_labels_pool_repeats_and_cache(folders, tmp_path):
    sets = {"big": {"labels": "2 per class"}, "small": {"labels": None}}
    made = stream(folders, sets=sets, labels="1 per class", pool=2, cache="ram", repeats=2, batch=36)
    assert made.samples_per_epoch == 6 + 3
    batches = take(made, 12)
    views: dict[str, set] = {}
    for key, *rest in served(batches).values():
        views.setdefault(key, set()).add(str(rest))
    assert Counter(key.partition("/")[0] for key in views) == {"big": 6, "small": 3}
    data = Data(made.config)
    assert data.part.samples == 9 and len(data.part.chosen) == 9
    chosen = EvalStream(
        Images(data.train), NoAugmentation(NoAugmentation.Config(size=8)), batch=9, numbers=data.part.chosen
    )
    assert set(next(iter(chosen)).keys) == set(views)


def test_a_share_that_cannot_be_is_told_by_the_key_that_asks_for_it(folders):
    with pytest.raises(InputError, match=r"^data\.train\.small\.labels: 90 per class of .*small"):
        stream(folders, sets={"big": {}, "small": {"labels": "90 per class"}})
    with pytest.raises(InputError, match=r"^data\.labels: 90 per class of .*"):
        stream(folders, sets={"big": {}, "small": {}}, labels="90 per class")


def test_only_samples_with_labels_are_evaluated_by(folders, tmp_path):
    photos, web = named(tmp_path / "p", ["cat", "owl"]), named(tmp_path / "w", ["bee", "cat", "fog"])
    assert labelled(joined(photos={"set": photos})) is None
    assert labelled(joined(photos={"set": photos, "classes": "none"})) is None
    some = joined(photos={"set": photos}, web={"set": web, "classes": {"bee": None, "cat": "cat", "fog": None}})
    chosen = labelled(some)
    assert chosen is not None and chosen.tolist() == [0, 1, 2, 3, 5, 8]
    assert labelled(Manifest.load(photos)) is None


def test_a_pool_counts_servings_of_the_sets_own_epochs(folders):
    augment = CropFlip(CropFlip.Config(size=6))
    seen: dict[str, list] = {}
    for batch in take(stream(folders, augment, sets=SETS, pool=3, batch=24), 60):
        for slot in batch.positions.argsort().tolist():
            seen.setdefault(batch.keys[slot], []).append(batch.views[0][slot])
    assert sum(torch.equal(views[0], views[1]) for views in seen.values()) < 5
    for views in seen.values():
        assert len(views) > 3
        assert all(torch.equal(view, views[number % 3]) for number, view in enumerate(views))


def test_a_steps_samples_are_named_with_their_sets(folders, tmp_path):
    train = {"big": {"set": str(folders["big"]), "weight": 2}, "small": {"set": str(folders["small"])}}
    recipe = {"duration": "20 steps", "batch": 12, "data": {"train": train}, "augment": {"name": "none", "size": 8}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    found = list(places(tmp_path / "recipe.yaml", [], step=15, rank=None, world=3))
    assert sorted(place.position for place in found) == list(range(180, 192))
    assert Counter(place.set for place in found) == {"big": 8, "small": 4}
    made = TrainStream(
        Data.Config(train=train, workers=0),
        NoAugmentation(NoAugmentation.Config(size=8)),
        batch=12,
        accumulation=1,
        rank=0,
        world=1,
        seed=0,
        clock=Clock(20, 12, 48),
    )
    keys = {position: key for position, (key, *_) in served(take(made, 1, 180)).items()}
    assert {place.position: place.key for place in found} == keys
    assert {place.epoch for place in found if place.set == "small"} <= {8, 9}  # 60 of its rows are done, of 7 samples


def test_damage_names_the_set(folders, tmp_path):
    bad = write_set(tmp_path / "bad", [9], label=lambda n: n % 3)
    key = damage(bad, 4)
    made = stream({**folders, "bad": bad.root}, sets={"bad": {}, "small": {}}, batch=18)
    (fault,) = take(made, 1)[0].faults
    assert (fault["shard"], fault["key"]) == ("bad/shard-000000.tar", f"bad/{key}")


def test_digests_prove_each_sets_own_epochs(folders):
    made = stream(folders, sets=SETS, repeats=2, world=1)
    digest, done, position = digest_of(made.course, 0), [], 0
    for number, batch in enumerate(take(made, 60)):
        digest.add(batch)
        position += 24
        done += digest.done(position)
        if number == 20:
            state = json.loads(json.dumps(digest.state()))
            digest = digest_of(made.course, position)
            digest.load(state)
    positions = dict(zip(("big", "small", "wide"), made.course.positions(position), strict=True))
    expected = {(name, epoch) for name, total in COUNTS.items() for epoch in range(positions[name] // (2 * total))}
    assert {(each["set"], each["epoch"]) for each in done} == expected and len(done) == len(expected)


def test_a_sample_served_twice_is_noticed(folders):
    made = stream(folders, sets=SETS)
    digest = digest_of(made.course, 0)
    batches = take(made, 60)
    batches[3].ids[5] = batches[3].ids[6]
    with pytest.raises(InputError, match=r"did not serve every sample of .* exactly once"):
        for number, batch in enumerate(batches):
            digest.add(batch)
            digest.done((number + 1) * 24)


# Resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sets": {**SETS, "small": {"weight": 2}}}, "data.train.small: the weight differs .*1.0 in the .* 2.0 now"),
        ({"sets": {"big": {"weight": 3}, "small": {}}}, "data.train.wide is gone"),
        ({"sets": {**SETS, "small": {"classes": "none"}}}, "the classes of the mixture, or the maps to them, differ"),
        ({"sets": {**SETS, "big": {"weight": 3, "labels": "50%"}}}, "data.train.big: .*data.labels chooses other"),
        ({"seed": 1}, "data.train.small: the seed differs"),
        ({"repeats": 2}, "data.repeats differs"),
    ],
)
def test_what_changed_is_refused_by_name(folders, changed, words):
    saved = json.loads(json.dumps(stream(folders, sets=SETS).identity))
    stream(folders, sets=SETS, total=200).check_identity(saved)  # a longer run is no change
    stream(folders, sets=SETS, batch=48, world=2).check_identity(saved)
    with pytest.raises(InputError, match=words):
        stream(folders, **({"sets": SETS} | changed)).check_identity(saved)


def test_a_curve_belongs_to_a_length_and_a_batch(folders):
    sets = {"big": {"weight": Linear(start=1.0, end=3.0).model_dump()}, "small": {}}
    saved = json.loads(json.dumps(stream(folders, sets=sets).identity))
    stream(folders, sets=sets).check_identity(saved)
    for changed in ({"total": 50}, {"batch": 48}):
        with pytest.raises(InputError, match="weights follow curves, and the run's length"):
            stream(folders, sets=sets, **changed).check_identity(saved)


def test_a_single_set_is_no_mixture(folders):
    alone = TrainStream(
        Data.Config(train=folders["big"], workers=0),
        NoAugmentation(NoAugmentation.Config(size=8)),
        batch=8,
        accumulation=1,
        rank=0,
        world=1,
        seed=0,
        clock=Clock(3, 8, 41),
    )
    names = {"manifest", "samples_per_epoch", "labels", "repeats", "order_version", "seed", "lanes", "block", "window"}
    assert alone.identity.keys() == names  # as checkpoints have it that know of no mixtures
    with pytest.raises(InputError, match=r"data.train is a mixture of big, small, wide now and was one set"):
        stream(folders).check_identity(alone.identity)


# Classes ---------------------------------------------------------------------------------------


def named(folder: Path, classes: list[str], each: int = 2) -> Path:
    manifest = write_set(folder, [len(classes) * each], label=lambda n: n % len(classes))
    replace(manifest, classes=tuple(classes)).save(folder)
    return folder


class Shown(Block):
    data: Data.Config


def joined(**sets):
    """The mixture of a recipe; InputError as people are told."""
    recipe = check(
        Shown,
        Source(values={"data": {"train": {name: each | {"set": str(each["set"])} for name, each in sets.items()}}}),
    )
    return Data(recipe.data).train


def labels_of(manifest) -> dict[str, int]:
    images = Images(manifest)
    records = [
        images.reader.record(shard, number)
        for shard, each in enumerate(manifest.shards)
        for number in range(each.samples)
    ]
    return {record.key: record.label for record in records}


def test_classes_go_by_name(tmp_path):
    photos, sketches = named(tmp_path / "p", ["ape", "cat", "owl"]), named(tmp_path / "s", ["bee", "cat"])
    both = joined(photos={"set": photos}, sketches={"set": sketches})
    assert both.classes == ("ape", "bee", "cat", "owl")
    assert both.class_counts == {0: 2, 1: 2, 2: 4, 3: 2}
    labels = labels_of(both)
    assert [labels[f"photos/{key_of(n)}"] for n in range(3)] == [0, 2, 3]
    assert [labels[f"sketches/{key_of(n)}"] for n in range(2)] == [1, 2]
    reader = Images(both).reader
    assert reader.column(1, "label").tolist() == [1, 2, 1, 2] and reader.column(1, "id").dtype == np.uint64


def test_classes_in_an_order_of_their_own_keep_it(tmp_path):
    one, two = named(tmp_path / "1", ["truck", "car"]), named(tmp_path / "2", ["bus", "car"])
    assert joined(one={"set": one}, two={"set": two}).classes == ("truck", "car", "bus")


def test_classes_by_a_map(tmp_path):
    photos, sketches = named(tmp_path / "p", ["cat", "owl"]), named(tmp_path / "s", ["s_bee", "s_cat", "s_fog"])
    given = {"s_bee": "bee", "s_cat": "cat", "s_fog": None}
    both = joined(photos={"set": photos}, sketches={"set": sketches, "classes": given})
    assert both.classes == ("bee", "cat", "owl")
    labels = labels_of(both)
    names = [labels[f"sketches/{key_of(n)}"] for n in range(3)]
    assert [both.class_name(label) for label in names] == ["bee", "cat", "(no label)"]
    assert both.unlabelled == 2
    file = tmp_path / "map.yaml"
    file.write_text("s_bee: bee\ns_cat: cat\ns_fog: null\n")
    assert joined(photos={"set": photos}, sketches={"set": sketches, "classes": str(file)}).identity == both.identity
    none = joined(photos={"set": photos}, sketches={"set": sketches, "classes": "none"})
    assert none.classes == ("cat", "owl") and none.unlabelled == 6


def test_classes_that_are_numbers(tmp_path):
    write_set(tmp_path / "a", [6], label=lambda n: n % 2), write_set(tmp_path / "b", [6], label=lambda n: n % 3)
    for name in "ab":
        replace(Manifest.load(tmp_path / name), classes=None).save(tmp_path / name)
    both = joined(a={"set": tmp_path / "a"}, b={"set": tmp_path / "b"})
    assert both.classes is None and both.class_counts == {0: 5, 1: 5, 2: 2}
    words = named(tmp_path / "w", ["cat", "owl"])
    with pytest.raises(InputError, match=r"data.train.a.classes: .* has numbers for classes .*`0: cat`"):
        joined(a={"set": tmp_path / "a"}, w={"set": words})
    mapped = joined(a={"set": tmp_path / "a", "classes": {0: "cat", 1: "owl"}}, w={"set": words})
    assert mapped.classes == ("cat", "owl") and mapped.class_counts == {0: 5, 1: 5}


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"cat": "cat"}, "data.train.s.classes: it says nothing of 'owl'; write `owl: NAME`"),
        ({"cat": "cat", "owl": None, "bet": "x"}, "has no class 'bet'"),
        ({"cat": "cat", "owls": None}, "has no class 'owls'; did you mean 'owl'?"),
        ("nowhere.yaml", "data.train.s.classes: nowhere.yaml cannot be read"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path, classes, words):
    other, mine = named(tmp_path / "o", ["cat", "owl"]), named(tmp_path / "s_", ["cat", "owl"])
    sets = {"o": {"set": other}, "s": {"set": mine, "classes": classes}}
    with pytest.raises(InputError) as refused:
        joined(**sets)
    assert words in str(refused.value)


def test_spellings_of_one_class_are_not_two(tmp_path):
    one, two = named(tmp_path / "1", ["polar bear", "owl"]), named(tmp_path / "2", ["Polar_Bear", "owl"])
    with pytest.raises(InputError, match="'Polar_Bear' here is 'polar bear' in one"):
        joined(one={"set": one}, two={"set": two})
    kept = {"Polar_Bear": "Polar_Bear", "owl": "owl"}
    assert len(joined(one={"set": one}, two={"set": two, "classes": kept}).classes) == 3


# Recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"a": {"set": "x", "wight": 3}}, "data.train.a.wight: unknown key; did you mean 'weight'?"),
        ({"a": {"weight": 3}}, "data.train.a.set: missing"),
        ({"a": {"set": "x", "weight": -1}}, "data.train.a.weight: a weight is above 0"),
        ({"a": {"set": "x", "weight": "heavy"}}, "data.train.a.weight: "),
        ({"a": {"set": "x", "weight": {"name": "linar"}}}, "data.train.a.weight.name: there is no 'linar'"),
        ({"a": {"set": "x", "labels": "many"}}, "data.train.a.labels: 'many' says no number of labels"),
        ({"a/b": {"set": "x"}}, "'a/b' cannot be the name of a set"),
        ({"a": None}, "a mixture needs a set"),
        ({"a": "x"}, "data.train.a: must be a block of keys and values"),
        (3, "data.train: "),
    ],
)
def test_mistakes_in_a_mixture_are_told_where_they_are(train, words):
    with pytest.raises(InputError) as refused:
        check(Shown, Source(values={"data": {"train": train}}))
    assert words in str(refused.value), refused.value


def test_a_recipe_comes_back_from_what_was_resolved(folders):
    curve = {"name": "linear", "start": 1.0, "end": 2.0}
    train = {"big": {"set": str(folders["big"]), "weight": curve}, "small": {"set": str(folders["small"])}}
    recipe = check(Shown, Source(values={"data": {"train": train}}))
    again = check(Shown, Source(values=recipe.model_dump(mode="json")))
    assert again == recipe and again.data.train["big"].weight.end == 2.0
    assert dict(recipe.data.places()) == {f"data.train.{name}.set": str(folders[name]) for name in ("big", "small")}
