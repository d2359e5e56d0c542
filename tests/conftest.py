"""Shared fixtures: pools of ranks, small shard sets."""

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator:
    """`ranks(world)` is a pool of that many gloo processes, kept for the session."""
    pools: dict[int, Pool] = {}

    def pool(world: int) -> Pool:
        return pools.setdefault(world, Pool(world))

    yield pool
    for each in pools.values():
        each.stop()
