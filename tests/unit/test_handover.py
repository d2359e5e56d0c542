"""How a batch passes from a worker to the training process."""

import io
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from penstock.streams.batch import Batch
from penstock.streams.handover import packed, room_for, unpacked


def sent(batch: Batch) -> tuple[Batch, int]:
    """What arrives on the other side, and the tensors that were shared for it."""
    shared = []
    file = io.BytesIO()

    class Counting(ForkingPickler):
        def reducer_override(self, thing):
            if isinstance(thing, torch.Tensor):
                shared.append(thing)
            return NotImplemented

    Counting(file).dump(batch)
    return ForkingPickler.loads(file.getvalue()), len(shared)


def batch_of(views: list[torch.Tensor], **more) -> Batch:
    rows = len(views[0])
    return Batch(
        views, torch.arange(rows) - 1, torch.ones(rows), torch.arange(rows) + (1 << 40), ["key"] * rows, **more
    )


def filled(sides: list[int]) -> list[torch.Tensor]:
    views = room_for([(4, 3, side, side) for side in sides])
    for number, view in enumerate(views):
        view.copy_(torch.randint(256, view.shape, generator=torch.Generator().manual_seed(number)).to(torch.uint8))
    return views


@pytest.mark.parametrize("sides", [[8], [8, 8], [9, 7, 5, 5]])
def test_views_of_one_piece_arrive_as_one_piece(sides):
    tiny = torch.arange(4.0).to(torch.float8_e4m3fn)
    extra = {"small": torch.arange(4.0), "half": torch.ones(4).bfloat16(), "tiny": tiny, "wave": torch.ones(4) * 1j}
    batch = batch_of(filled(sides), step=3, extra=extra)
    arrived, shared = sent(batch)
    assert shared == 3  # the views, and the two types that arrays do not have
    assert all(map(torch.equal, batch.views, arrived.views)) and len(arrived.views) == len(sides)
    for name in ("labels", "weights", "positions"):
        assert torch.equal(getattr(batch, name), getattr(arrived, name))
        assert getattr(batch, name).dtype == getattr(arrived, name).dtype
    assert arrived.keys == batch.keys and arrived.step == 3 and arrived.ids is None
    assert all(batch.extra[name].tolist() == arrived.extra[name].tolist() for name in batch.extra)
    arrived.weights.add_(1)  # arrays that arrive can be written to


def test_views_that_a_stage_replaced():
    views = filled([8, 6])
    others = [views[0].float(), views[1].flip(-1), views[0][::2]]
    assert packed(others) is others
    arrived, shared = sent(batch_of(others[:2]))
    assert shared == 2 and all(map(torch.equal, others, arrived.views))


def test_parts_of_a_view_keep_their_place():
    views = filled([8])
    rows = [views[0][1:3], views[0][3:]]
    assert all(map(torch.equal, rows, unpacked(packed(rows))))


def test_the_memory_of_views_that_are_left_lives_on():
    arrived, _ = sent(batch_of(filled([8, 8])))
    last = arrived.views[1]
    expected = last.clone()
    del arrived
    assert torch.equal(last, expected)
