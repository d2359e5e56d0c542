"""Cached answers over ranks: two write what one writes, and each rank gets the answers of its own views."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from finetune.answers import Cache, restore
from penstock.errors import RunFailed
from tests import cached
from tests.cached import CLASSES, SIZES, VIEWS
from tests.trees import fingerprints


def write(rank: int, world: int, folder: Path, out: Path) -> tuple[int, int] | None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of a product may depend on it
    try:
        done = cached.write(out, cached.recipe(folder))
    finally:
        torch.set_num_threads(threads)
    return None if done is None else (done.views, done.kept)


def served(rank: int, world: int, folder: Path, out: Path, since: int, micros: int) -> dict[int, tuple]:
    """By position: key, pixels, the restored answer, and how far it is from the teacher's own."""
    made = cached.recipe(folder, repeats=2)
    stream = cached.student(made, Cache.open(out, cached.identity(made)), 12, rank, world)
    found = {}
    for batch in islice(stream.batches(since), micros):
        logits = restore(batch.extra, len(CLASSES))
        apart = (logits.softmax(1) - cached.answered(batch.views[0]).exp()).abs().amax(1)
        for slot, position in enumerate(batch.positions.tolist()):
            pixels = batch.views[0][slot].numpy().tobytes()
            found[position] = batch.keys[slot], pixels, logits[slot].tolist(), float(apart[slot])
    return found


@pytest.mark.ranks
def test_two_ranks_write_what_one_writes_and_read_what_one_reads(ranks, tmp_path):
    folder = cached.make_set(tmp_path / "set")
    assert write(0, 1, folder, tmp_path / "one") == (sum(SIZES) * VIEWS, 0)
    assert ranks(2).run(write, folder, tmp_path / "two") == [(sum(SIZES) * VIEWS, 0), None]
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
    # A run of two ranks that goes on with one in the midst of an epoch, and the other way round.
    whole = served(0, 1, folder, tmp_path / "one", 0, 8)
    first = ranks(2).run(served, folder, tmp_path / "two", 0, 3)
    second = served(0, 1, folder, tmp_path / "two", 36, 2)
    third = ranks(2).run(served, folder, tmp_path / "two", 60, 3)
    assert {**first[0], **first[1], **second, **third[0], **third[1]} == whole
    assert max(apart for *_, apart in whole.values()) < 1e-4


def fail(rank: int, world: int, folder: Path, out: Path) -> str:
    teaches = cached.teacher()
    if rank == 1:
        teaches.network.weight[0, 0] = float("nan")
    with pytest.raises(RunFailed) as error:
        cached.write(out, cached.recipe(folder), teaches=teaches)
    return str(error.value)


@pytest.mark.ranks
def test_nobody_waits_for_a_rank_that_failed(ranks, tmp_path):
    folder = cached.make_set(tmp_path / "set")
    said = ranks(2).run(fail, folder, tmp_path / "out")
    assert "rank 1 could not go on" in said[0]
    assert "not numbers" in said[1]
    done = ranks(2).run(write, folder, tmp_path / "out")[0]
    assert done[1] == 3  # those of rank 0, and an empty one


@pytest.mark.ranks
def test_two_ranks_go_on_with_what_is_missing(ranks, tmp_path):
    folder = cached.make_set(tmp_path / "set")
    write(0, 1, folder, tmp_path / "out")
    before = fingerprints(tmp_path / "out")
    tars = sorted((tmp_path / "out").glob("*.tar"))
    tars[3].unlink()
    content = bytearray(tars[2].read_bytes())
    content[700] ^= 1
    tars[2].write_bytes(content)
    assert ranks(2).run(write, folder, tmp_path / "out") == [((SIZES[2] + SIZES[3]) * VIEWS, 2), None]
    assert fingerprints(tmp_path / "out") == before
