"""Proof that each epoch served each sample once: an order-free checksum of the ids served."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock import distributed
from penstock.errors import InputError
from penstock.keyed import splitmix64_tensor
from penstock.streams.batch import Batch
from penstock.streams.positions.mixture_order import Course
from penstock.streams.positions.part import Part

MASK = (1 << 64) - 1


class EpochDigest:
    """Sums splitmix64(id), modulo 2^64, of every sample served, per epoch; unreadable samples count as served.

    With repeated augmentation an epoch here is a round that serves every sample that many times.

    `add` the batches of each finished optimizer step. `check` and `state` are collective: call them on all ranks, at
    the same position. The state is the sum over ranks, so that another number of ranks can take it over.
    """

    def __init__(self, part: Part, since: int = 0):
        self.part = part
        self.checked = -(-since // part.round)  # epochs before are done; one that was entered unseen is not judged
        self.sums: dict[int, int] = {}  # per epoch, of this rank

    def add(self, batch: Batch) -> None:
        assert batch.ids is not None
        self.add_ids(batch.positions.cpu(), batch.ids)

    def add_ids(self, positions: Tensor, ids: Tensor) -> None:
        """Samples served at some positions of the set's order, both int64 [B]."""
        epochs = positions // self.part.round
        hashes = splitmix64_tensor(ids)
        for epoch in epochs.unique().tolist():
            partial = int(hashes[epochs == epoch].sum())  # int64 wraps, which is arithmetic modulo 2^64
            self.sums[epoch] = (self.sums.get(epoch, 0) + partial) & MASK

    def done(self, position: int) -> list[dict[str, Any]]:
        """`check`, for the journal."""
        return [{"epoch": epoch} for epoch in self.check(position)]

    def check(self, position: int) -> list[int]:
        """Compare every epoch that is complete at `position` with the manifest's; returns their numbers.

        Raises:
            InputError: on all ranks, naming the epoch; samples were lost, doubled or exchanged.
        """
        complete = list(range(self.checked, position // self.part.round))
        for epoch in complete:
            served = self._over_ranks(self.sums.pop(epoch, 0))
            if served != self.part.digest_of_round:
                raise InputError(
                    f"epoch {epoch} did not serve every sample of {self.part.root} exactly once: the digest of the "
                    f"ids served is {served:016x}, the manifest's {self.part.digest_of_round:016x}. "
                    f"Run `penstock shards verify {self.part.root}`; if it finds nothing, this is a bug to report"
                )
            self.checked = epoch + 1
        return complete

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON-ready."""
        epochs = sorted({epoch for known in distributed.collect(list(self.sums)) for epoch in known})
        sums = {str(epoch): f"{self._over_ranks(self.sums.get(epoch, 0)):016x}" for epoch in epochs}
        return {"checked": self.checked, "sums": sums}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's sums; rank 0 carries them for all."""
        self.checked = state["checked"]
        self.sums = {int(epoch): int(served, 16) for epoch, served in state["sums"].items()}
        if distributed.rank() != 0:
            self.sums = {}

    def _over_ranks(self, value: int) -> int:
        signed = value - (1 << 64) if value >= 1 << 63 else value
        total = distributed.all_sum(torch.tensor(signed, dtype=torch.int64, device=distributed.device()))
        return int(total) & MASK


class MixedDigest:
    """An `EpochDigest` for each set of a mixture, over the set's own epochs. For positions of the mixture."""

    def __init__(self, course: Course, since: int = 0):
        self.course = course
        owns = zip(course.sets, course.positions(since), strict=True)
        self.digests = {each.name: EpochDigest(each.part, own) for each, own in owns}

    def add(self, batch: Batch) -> None:
        assert batch.ids is not None
        rows, again = np.divmod(batch.positions.cpu().numpy(), self.course.repeats)
        sets, own = self.course.own(rows)
        positions = torch.from_numpy(own * self.course.repeats + again)
        for number, digest in enumerate(self.digests.values()):
            here = torch.from_numpy(sets == number)
            digest.add_ids(positions[here], batch.ids[here])

    def done(self, position: int) -> list[dict[str, Any]]:
        """The epochs of each set that ended since the last time; raises InputError as `EpochDigest.check`."""
        owns = zip(self.digests.items(), self.course.positions(position), strict=True)
        return [{"set": name, "epoch": epoch} for (name, digest), own in owns for epoch in digest.check(own)]

    def state(self) -> dict[str, Any]:
        return {name: digest.state() for name, digest in self.digests.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, digest in self.digests.items():
            digest.load(state[name])


def digest_of(course: Course, since: int) -> EpochDigest | MixedDigest:
    """What proves a run's epochs from a position on."""
    return EpochDigest(course.sets[0].part, since) if course.shares is None else MixedDigest(course, since)
