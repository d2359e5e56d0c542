"""A fixed pool of views: which one comes when, and that it has the same pixels whoever asks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.augment._views import Shown, Viewer
from penstock.augment.standard import Standard
from penstock.errors import InputError
from penstock.keyed import seed_sample
from penstock.recipe import Source, check
from penstock.schedule import Linear
from penstock.streams.decode import Need, decode_smaller
from penstock.streams.loader import POOL
from penstock.streams.reader import ShardReader
from penstock.streams.sets.manifest import Manifest
from pretrain.recipe import Pretrain
from tests import cached
from tests.cached import SIDE, VIEWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return cached.make_set(tmp_path_factory.mktemp("pool") / "set")


def by_hand(folder: Path, smaller: bool = True) -> dict[tuple[str, int], np.ndarray]:
    """Every view of the pool, from the file formats and the promise alone; and how small images were decoded."""
    augment, reader = Standard(cached.recipe(folder).augment), ShardReader(Manifest.load(folder))
    knobs, found = {"size": SIDE, "strength": 1.0}, {}
    for shard, samples in enumerate(cached.SIZES):
        for sample in range(samples):
            data, _, key, identity = reader.read(shard, sample)
            for number in range(VIEWS):

                def need(height: int, width: int, number: int = number, identity: int = identity) -> Need:
                    seed_sample(POOL, identity, number, 0)
                    least = min(augment.box(height, width, 0, knobs)[2:])
                    return Need(max(f for f in (1, 2, 4, 8) if f == 1 or least >= f * SIDE) if smaller else 1)

                image, whole = decode_smaller(data, 3, need)
                seed_sample(POOL, identity, number, 0)
                found[key, number] = augment.view(image, 0, knobs, whole).numpy()
    return found


@pytest.mark.parametrize("repeats", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("decode", ["smaller", "whole"])
def test_every_serving_shows_the_view_whose_turn_it_is(folder, repeats, world, decode):
    expected = by_hand(folder, smaller=decode == "smaller")
    served: dict[str, int] = {}
    made = cached.recipe(folder, repeats=repeats, labels="50%", decode=decode)
    batches = [b for r in range(world) for b in cached.take(cached.student(made, None, 12, r, world), 12)]
    slots = sorted((p, b.keys[i], b.views[0][i]) for b in batches for i, p in enumerate(b.positions.tolist()))
    for _, key, view in slots:  # in the order of positions, which is that of servings
        number = served.get(key, 0)
        assert np.array_equal(view.numpy(), expected[key, number % VIEWS]), (key, number)
        served[key] = number + 1
    assert len(slots) == 144
    assert 1 < len(served) < sum(cached.SIZES)


def test_the_pool_is_not_one_view(folder):
    views = by_hand(folder)
    assert len({view.tobytes() for view in views.values()}) == len(views)
    small = sum(not np.array_equal(views[name], view) for name, view in by_hand(folder, smaller=False).items())
    assert small > len(views) // 4  # so decoding smaller was tried


@pytest.mark.parametrize("repeats", [1, 2])
def test_workers_order_and_restarts_change_nothing(folder, repeats):
    whole = cached.pixels(cached.take(cached.student(cached.recipe(folder, repeats=repeats), None), 8))
    forked = cached.recipe(folder, repeats=repeats, workers=2)
    assert_same(whole, cached.pixels(cached.take(cached.student(forked, None), 8)))
    resumed = cached.pixels(cached.take(cached.student(forked, None), 5, since=36))
    assert_same({p: view for p, view in whole.items() if p >= 36}, resumed)
    other = cached.student(cached.recipe(folder, repeats=repeats, lanes=1, window=7), None)
    views = {view.tobytes() for view in by_hand(folder).values()}
    assert {view.tobytes() for view in cached.pixels(cached.take(other, 8)).values()} <= views


def assert_same(ours: dict[int, np.ndarray], theirs: dict[int, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[position], theirs[position]) for position in ours)


def test_another_seed_gives_another_order_of_the_same_views(folder):
    """One cache serves runs of all seeds."""
    first, second = (
        cached.pixels(cached.take(cached.student(cached.recipe(folder, seed=seed), None), 8)) for seed in (4, 5)
    )
    assert {view.tobytes() for view in first.values()} == {view.tobytes() for view in second.values()}
    assert any(first[position].tobytes() != second[position].tobytes() for position in first)


def test_augment_show_draws_the_pools_views(folder):
    made = cached.recipe(folder, repeats=2)
    values = {"seed": 4, "duration": "9 steps", "batch": 12, "data": made.data.model_dump(mode="json")}
    viewer = Viewer(check(Shown, Source(values=values | {"augment": made.augment.model_dump(mode="json")})))
    shown = cached.pixels(cached.take(cached.student(made, None), 9))
    for position in (0, 7, 50, 100):
        (view,) = viewer.views(position)
        assert view.pixels is not None
        assert np.array_equal(view.pixels.transpose(2, 0, 1), shown[position])


@pytest.mark.parametrize("curve", ["size", "strength", "batch_growth"])
def test_what_would_change_the_pool_is_refused(folder, curve):
    values: dict[str, Any] = {
        "name": "pool",
        "duration": "2 steps",
        "batch": 8,
        "data": {"train": str(folder), "pool": 4},
        "augment": {"name": "standard", "size": 16},
        "backbone": {"name": "test_resnet", "size": 16},
        "method": {"name": "simclr"},
        "optim": {"lr": 0.1},
    }
    if curve == "batch_growth":
        values["batch_growth"] = 2.0
    else:
        values["augment"][curve] = Linear(start=16, end=32).model_dump(mode="json")
    with pytest.raises(InputError, match=rf"{curve}: .*data\.pool"):
        check(Pretrain, Source(values=values))


def test_extra_moves_with_the_batch(folder):
    (batch,) = cached.take(cached.student(cached.recipe(folder), None), 1)
    assert batch.extra == {}
    assert torch.equal(batch.to(torch.device("cpu")).views[0], batch.views[0])
