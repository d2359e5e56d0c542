"""Unreadable samples: listed as they come, and the end of the run when there are too many."""

import json
from collections import deque
from pathlib import Path

import torch

from penstock import distributed
from penstock.errors import InputError
from penstock.streams.batch import Batch

WINDOW = 100_000  # samples over which the rate is taken
FEWEST = 10  # faults below which no rate is alarming
SHOWN = 20
DROPPED = "dropped"  # by a stage of the user
KINDS = ("unreachable", "short", "changed", "undecodable", "extra", "no_answer", "other")  # of a `Fault`, say


class FaultLog:
    """Appends this rank's faults to a JSONL file, and stops the run above a rate over all ranks.

    Args:
        folder: the run's folder; each rank writes `faults-rank-00000.jsonl`.
        max_bad: the highest share of unreadable samples, judged over the last 100,000 samples (or as many as there
            were) once 10 of them are unreadable. Samples that a stage of the user dropped are counted apart.
    """

    def __init__(self, folder: Path, max_bad: float):
        self.path = folder / f"faults-rank-{distributed.rank():05d}.jsonl"
        self.max_bad = max_bad
        self.total = 0  # over all ranks, as of the last check
        self.kinds = dict.fromkeys(KINDS, 0)  # the total by what was wrong
        self.dropped = 0  # over all ranks, as of the last check
        self._recent: deque[dict] = deque(maxlen=SHOWN)
        self._new = [0] * (2 + len(KINDS))  # samples, dropped ones, faults by kind, of this rank since the last check
        self._window: deque[tuple[int, int]] = deque()

    def add(self, batch: Batch) -> None:
        """Count a micro-batch, and write its faults down."""
        self._new[0] += len(batch)
        for fault in batch.faults:
            if fault["kind"] == DROPPED:
                self._new[1] += 1
            else:
                self._new[2 + KINDS.index(fault["kind"] if fault["kind"] in KINDS else "other")] += 1
                self._recent.append(fault)
        if batch.faults:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(fault | {"step": batch.step}, ensure_ascii=False) + "\n" for fault in batch.faults
                )

    def check(self) -> int:
        """Collective: faults so far over all ranks.

        Raises:
            InputError: on all ranks, with a list, when the rate has passed `max_bad`.
        """
        counts = torch.tensor(self._new, dtype=torch.int64, device=distributed.device())
        samples, dropped, *kinds = distributed.all_sum(counts).tolist()
        self._new = [0] * len(self._new)
        self.kinds = {kind: count + new for (kind, count), new in zip(self.kinds.items(), kinds, strict=True)}
        faults = sum(kinds)
        self.total += faults
        self.dropped += dropped
        self._window.append((samples, faults))
        while sum(count for count, _ in self._window) - self._window[0][0] >= WINDOW:
            self._window.popleft()
        seen, bad = (sum(column) for column in zip(*self._window, strict=True))
        if bad >= FEWEST and bad > self.max_bad * seen:
            recent = [fault for faults in distributed.collect(list(self._recent)) for fault in faults][:SHOWN]
            listed = "\n".join(f"  {fault['shard']}: {fault['key']}: {fault['reason']}" for fault in recent)
            raise InputError(
                f"{bad} of the last {seen:,} samples cannot be read, more than data.max_bad = {self.max_bad:g} allows. "
                f"The last ones:\n{listed}\nAll are in {self.path.parent}/faults-rank-*.jsonl. Repair or repack the "
                "shards (`penstock shards verify` names every damaged one), or raise data.max_bad"
            )
        return self.total
