"""The attempts of a run, by its journal: one that resumes it may go on with another batch."""

from dataclasses import dataclass, field
from pathlib import Path

from penstock.tracking.journal import NAME, read_lines

GROWTH = ("augment", "backbone", "batch_growth", "duration")  # blocks that sizes of growing batches depend on


@dataclass
class Attempt:
    """A start or resume of a run, as far as it decides which samples its steps serve."""

    params: dict[str, str]  # its recipe, flat
    world: int
    since: int = 0  # optimizer steps done before it
    known: dict[int, int] = field(default_factory=dict)  # samples served when so many steps were done
    grew_else: bool = False  # its batches grew, by what the run's newest recipe has no more


def attempts_until(run: Path, step: int) -> list[Attempt]:
    """The attempts that trained from this step or an earlier one on: the last of them did the step, or would have.

    What it wrote of later steps than it resumed at replaces what earlier attempts had done of them. None for a run
    without a journal.
    """
    found: list[Attempt] = []
    trained = 0  # how many of them did; another attempt may have failed before its first step
    newest: dict[str, str] = {}
    for line in read_lines(run / NAME):
        if "attempt" in line:
            del found[trained:]
            newest = line["attempt"]["params"]
            found.append(Attempt(newest, int(line["attempt"]["tags"].get("world_size", 1))))
        elif found and line.get("event") in ("started", "resumed"):
            found[-1].since, trained = line["step"], len(found)
            found[-1].world = line["data"].get("ranks_now", found[-1].world)
            if "samples" in line["data"]:
                found[-1].known[line["step"]] = line["data"]["samples"]
        elif found and "progress/samples" in line.get("metrics", {}):
            found[-1].known[line["step"]], trained = round(line["metrics"]["progress/samples"]), len(found)
    del found[trained:]
    while found and found[-1].since > step:
        found.pop()
    for attempt in found:
        attempt.grew_else = bool(growth := _growth(attempt.params)) and growth != _growth(newest)
    return found


def _growth(params: dict[str, str]) -> dict[str, str]:
    """What sizes of growing batches depend on beside the batch; nothing where batches stay as they are."""
    if float(params.get("batch_growth", 1)) == 1:
        return {}
    return {key: value for key, value in params.items() if key.partition(".")[0] in GROWTH}
