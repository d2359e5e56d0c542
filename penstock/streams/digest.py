"""Proof that each epoch served each sample once: an order-free checksum of the ids served."""

from collections.abc import Mapping
from typing import Any

import torch

from penstock import distributed
from penstock.errors import InputError
from penstock.keyed import splitmix64_tensor
from penstock.streams.batch import Batch
from penstock.streams.part import Part

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
        epochs = batch.positions.cpu() // self.part.round
        hashes = splitmix64_tensor(batch.ids)
        for epoch in epochs.unique().tolist():
            partial = int(hashes[epochs == epoch].sum())  # int64 wraps, which is arithmetic modulo 2^64
            self.sums[epoch] = (self.sums.get(epoch, 0) + partial) & MASK

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
