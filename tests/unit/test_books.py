"""What the loop writes down about samples: none that cannot be read goes unnoticed, whenever a run ends."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.errors import InputError
from penstock.schedule import Clock, Length
from penstock.trainer import Books, State, _save
from tests.shards import damage, write_set
from tests.unit.test_train_stream import stream

STEPS, BATCH = 7, 8


class Loop:
    """The end of each step, as `fit` does it."""

    def __init__(self, folder: Path, max_bad: float = 1.0):
        manifest = write_set(folder / "set", [STEPS * BATCH])
        for number in range(0, STEPS * BATCH, 2):
            damage(manifest, number)
        self.stream = stream(manifest.root, batch=BATCH, max_bad=max_bad)
        self.logged: dict[str, float] = {}
        tracker = SimpleNamespace(log=lambda step, values: self.logged.update(values), event=self, flush=self)
        checkpoints = SimpleNamespace(config=SimpleNamespace(keep_every=None), save=self)
        state = SimpleNamespace(state=dict)
        self.run: Any = SimpleNamespace(
            stream=self.stream, folder=folder, tracker=tracker, checkpoints=checkpoints, meters=state, monitor=state,
            report_every=Length(5, "steps"), engine=None, average=None,
        )  # fmt: skip
        self.state = State()
        self.books = Books(self.run, self.state)

    def __call__(self, *_: Any, **__: Any) -> None:
        """Does nothing, as what is not looked at here."""

    def steps(self, count: int) -> Any:
        clock = Clock(STEPS, BATCH, STEPS * BATCH)
        for batch in islice(self.stream.batches(0), count):
            self.state.step += 1
            self.state.samples += BATCH
            tick = clock.tick(self.state.step, self.state.samples, self.state.samples - BATCH)
            self.books.close_step([batch], self.state, tick)
        return tick


def test_the_tail_of_a_run_is_counted(tmp_path):
    loop = Loop(tmp_path)
    loop.steps(STEPS)
    assert loop.logged["data/unreadable"] == loop.logged["data/unreadable_changed"] == STEPS * BATCH // 2


def test_the_tail_of_a_run_is_judged(tmp_path):
    loop = Loop(tmp_path, max_bad=0.1)
    with pytest.raises(InputError, match=r"data\.max_bad"):
        loop.steps(5)
    loop = Loop(tmp_path / "short", max_bad=0.1)
    tick = loop.steps(4)  # stopped here
    with pytest.raises(InputError, match=r"data\.max_bad"):
        _save(loop.run, loop.state, loop.books, tick)


def test_what_came_before_a_stop_is_counted(tmp_path):
    loop = Loop(tmp_path)
    tick = loop.steps(6)
    before = loop.logged["data/unreadable"]
    _save(loop.run, loop.state, loop.books, tick)
    lines = (tmp_path / "faults-rank-00000.jsonl").read_text().splitlines()
    assert loop.logged["data/unreadable"] == len(lines) > before
