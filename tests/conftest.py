"""Shared fixtures: pools of ranks, small shard sets."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

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


@pytest.fixture(autouse=True)
def no_group_is_left_behind() -> Iterator:
    """A process group in the tests' own process would reach every later test, and its port every child process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        pytest.fail("this test started a process group in the tests' own process; run it through `ranks(1).run`")
