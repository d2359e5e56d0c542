"""A record of every sample consumed, in the run folder: one line of JSON per micro-batch and rank.

Each attempt (a start or resume of the run) writes files of its own, so a line cut by a crash stays the last of its
file. An attempt that resumes at step s replaces whatever earlier attempts wrote of step s and later.
"""

import json
import re
from pathlib import Path
from typing import Any

from penstock import distributed
from penstock.errors import InputError
from penstock.streams.batch import Batch

NAME = re.compile(r"attempt-(\d+)-rank-(\d+)\.jsonl")
NAMED = "attempt-{:04d}-rank-{:05d}.jsonl"


class Ledger:
    """Creating one is collective: the ranks agree on the attempt's number.

    Args:
        folder: the run's ledger folder, shared by the ranks.
        since_step: optimizer steps done before this attempt.
    """

    def __init__(self, folder: Path, since_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        attempt = distributed.broadcast(max((number for number, _ in _files(folder)), default=0) + 1)
        self.rank = distributed.rank()
        self._file = (folder / NAMED.format(attempt, self.rank)).open("x", encoding="utf-8")
        self._write({"since_step": since_step, "world": distributed.world()})

    def append(self, batches: list[Batch]) -> None:
        """The micro-batches of one optimizer step of this rank, once the step is done."""
        for batch in batches:
            self._write(
                {
                    "step": batch.step,
                    "rank": self.rank,
                    "positions": batch.positions.tolist(),
                    "keys": batch.keys,
                    "weights": batch.weights.tolist(),
                }
            )

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def read_ledger(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Per optimizer step, the records of all ranks that hold: those of the last attempt that did the step."""
    steps: dict[int, list[dict[str, Any]]] = {}
    attempts: dict[int, list[Path]] = {}
    for attempt, path in _files(folder):
        attempts.setdefault(attempt, []).append(path)
    for attempt in sorted(attempts):
        read = [lines for path in sorted(attempts[attempt]) if (lines := _lines(path))]
        since = min((lines[0]["since_step"] for lines in read), default=None)
        if since is None:  # killed before any rank had written its first line
            continue
        steps = {step: records for step, records in steps.items() if step < since}
        for lines in read:
            for record in lines[1:]:
                steps.setdefault(record["step"], []).append(record)
    return dict(sorted(steps.items()))


def world_at(folder: Path, step: int) -> int | None:
    """Ranks of the last attempt that began before a step was done; None where there is no such record."""
    found = _attempt_of(folder, step)
    return found[1] if found else None


def served_at(folder: Path, step: int) -> dict[int, list[list[int]]]:
    """Positions of a step by rank and micro-batch, as they were served; nothing where not all ranks have written it."""
    attempt, world = _attempt_of(folder, step) or (0, 0)
    found: dict[int, list[list[int]]] = {}
    for rank in range(world):
        path = folder / NAMED.format(attempt, rank)
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(f'{{"step": {step},') and line.endswith("\n")]
        found[rank] = [json.loads(line)["positions"] for line in lines]
    return found if len({len(micros) for micros in found.values()} - {0}) == 1 and all(found.values()) else {}


def _attempt_of(folder: Path, step: int) -> tuple[int, int] | None:
    """Number and ranks of the last attempt that began before a step was done."""
    for attempt, path in sorted(_files(folder), reverse=True):
        if path.name != NAMED.format(attempt, 0):
            continue
        with path.open(encoding="utf-8") as file:
            line = file.readline()
        if line.endswith("\n") and (first := json.loads(line))["since_step"] <= step:
            return attempt, first["world"]
    return None


def _files(folder: Path) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The file's records, without a last line that a crash cut short."""
    *whole, _cut = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
