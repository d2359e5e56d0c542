import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.tracking import Tracker
from penstock.tracking.journal import Journal, flatten, read_lines, read_run

OFF = Tracker.Config(enabled=False)


def tracker(folder: Path, params: dict | None = None, active: bool = True) -> Tracker:
    return Tracker(OFF, folder, folder.name, params or {}, {"world": "2"}, active)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_every_call_is_on_disk_when_it_returns(tmp_path):
    run = tracker(tmp_path / "run")
    run.log(1, {"train/loss": 0.1 + 0.2, "train/lr": 1})
    assert lines(tmp_path / "run")[-1]["metrics"] == {"train/loss": 0.1 + 0.2, "train/lr": 1.0}
    run.event("skipped", 2, loss=math.nan, keys=["a/1", 2, math.inf], where=Path("x"))
    assert lines(tmp_path / "run")[-1]["data"] == {"loss": "nan", "keys": ["a/1", 2, "inf"], "where": "x"}
    run.close("FINISHED")
    assert lines(tmp_path / "run")[-1]["status"] == "FINISHED"


def test_other_ranks_write_nothing(tmp_path):
    run = tracker(tmp_path / "run", active=False)
    run.log(1, {"train/loss": 1.0})
    run.event("x", 1)
    run.picture(1, "x", np.zeros((3, 2, 2), np.uint8))
    run.tag("a", "b")
    run.dataset("d", "1", "/d")
    run.flush()
    run.close("FINISHED")
    assert not (tmp_path / "run").exists()


def test_replayed_steps_are_kept_once(tmp_path):
    """Killed at step 8, resumed from a checkpoint at step 5: the history is that of an unbroken run."""
    first = tracker(tmp_path / "run")
    for step in range(1, 9):
        first.log(step, {"train/loss": step / 3})
    first.log(4, {"eval/knn": 0.5})
    second = tracker(tmp_path / "run")
    for step in range(6, 12):
        second.log(step, {"train/loss": step / 3})
        if step % 4 == 0:
            second.log(step, {"eval/knn": step / 100})  # step 8 was killed before its evaluation
    run = read_run(tmp_path / "run")
    assert run.series["train/loss"] == [(step, step / 3) for step in range(1, 12)]
    assert run.series["eval/knn"] == [(4, 0.5), (8, 0.08)]


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_torn_last_line_is_cut_off(tmp_path, cut):
    run = tracker(tmp_path / "run")
    for step in (1, 2, 3):
        run.log(step, {"train/loss": float(step)})
    path = tmp_path / "run" / "journal.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    assert read_run(tmp_path / "run").series["train/loss"] == [(1, 1.0), (2, 2.0)]
    again = tracker(tmp_path / "run")
    again.log(3, {"train/loss": 3.0})
    assert read_run(tmp_path / "run").series["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_torn_first_line_leaves_an_empty_journal(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(b'{"time": 1, "attem' + b"x" * 200_000)
    assert Journal(tmp_path).attempts == []
    assert (tmp_path / "journal.jsonl").stat().st_size == 0


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"time": 1, "step": 1, "event": "a", "data": {}}\n{"time": \n')
    with pytest.raises(InputError, match="byte 49 is damaged"):
        list(read_lines(tmp_path / "journal.jsonl"))


def test_values_that_are_not_finite_are_kept_and_counted(tmp_path):
    run = tracker(tmp_path / "run")
    run.log(1, {"a": math.inf, "b": math.nan, "c": 1.0})
    run.log(2, {"a": 1.0})
    again = tracker(tmp_path / "run")
    again.log(2, {"a": math.nan})  # a replay counts nothing
    again.log(3, {"a": -math.inf})
    assert "Infinity" not in (tmp_path / "run" / "journal.jsonl").read_text()  # strict JSON
    series = read_run(tmp_path / "run").series
    assert [value for _, value in series["a"]] == [math.inf, 1.0, -math.inf]
    assert math.isnan(series["b"][0][1])
    assert series["health/nonfinite"] == [(1, 2.0), (3, 3.0)]


def test_an_attempt_says_what_it_changed(tmp_path):
    tracker(tmp_path / "run", {"optim": {"lr": 0.1, "eps": 1}}).close("KILLED")
    tracker(tmp_path / "run", {"optim": {"lr": 0.2}}).close("FINISHED")
    attempts = [line["attempt"] for line in lines(tmp_path / "run") if "attempt" in line]
    assert [attempt["number"] for attempt in attempts] == [1, 2]
    assert attempts[0]["id"] == attempts[1]["id"]
    assert attempts[1]["changed"] == {"optim.lr": ["0.1", "0.2"], "optim.eps": ["1", None]}
    assert attempts[1]["tags"]["attempt"] == "2"


def test_one_process_at_a_time_writes_a_run(tmp_path, monkeypatch):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr("penstock.tracking.journal.OTHERS_WAIT", 0.2)
        with pytest.raises(InputError, match="another process"):
            tracker(tmp_path / "run")
        assert read_run(tmp_path / "run").status == "RUNNING"
    finally:
        holder.kill()
        holder.communicate()
    assert read_run(tmp_path / "run").status == "FAILED"  # gone without a word
    tracker(tmp_path / "run").close("FINISHED")


HOLD = """
import sys
from pathlib import Path
from penstock.tracking import Tracker
run = Tracker(Tracker.Config(enabled=False), Path(sys.argv[1]), "run", {}, {}, True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_full_disk_loses_no_line(tmp_path, monkeypatch, capsys):
    journal = Journal(tmp_path)
    real, room = os.write, 40

    def full(file: int, data: bytes) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(28, "No space left on device")
        written = real(file, data[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", full)
    journal.metrics(1, {"a": 1.0})
    journal.metrics(2, {"a": 2.0})
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(OSError):
        journal.flush()  # a checkpoint after these lines must not count
    room = 10_000
    journal.metrics(3, {"a": 3.0})
    assert [line["step"] for line in read_lines(tmp_path / "journal.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["train/lo@ss", "a%", "", "/a", "a//b", "../a", "x" * 251])
def test_metric_names_mlflow_would_refuse_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="metric"):
        tracker(tmp_path / "run").log(1, {name: 1.0})


@pytest.mark.parametrize("shape", [(3, 5, 7), (5, 7, 3)])
def test_pictures_in_either_layout(tmp_path, shape):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    run = tracker(tmp_path / "run")
    run.picture(30, "reconstruction", pixels)
    run.picture(30, "reconstruction", pixels * 0)  # a replay
    shown = np.asarray(Image.open(tmp_path / "run" / "pictures" / "reconstruction" / "00000030.png"))
    assert (shown == (pixels if shape[-1] == 3 else pixels.transpose(1, 2, 0))).all()
    assert sum("picture" in line for line in lines(tmp_path / "run")) == 1


def test_flatten():
    nested = {"a": {"b": 1, "c": [1, 2.5], "d": {}}, "e": [{"name": "knn"}, {"name": "lin"}], "f": None, "g": "x"}
    assert flatten(nested) == {
        "a.b": "1",
        "a.c": "[1, 2.5]",
        "a.d": "{}",
        "e.0.name": "knn",
        "e.1.name": "lin",
        "f": "None",
        "g": "x",
    }


def test_stores_that_cannot_work_are_refused(monkeypatch, tmp_path):
    for uri in ("file:///tmp/mlruns", "mlruns"):
        with pytest.raises(ValueError, match="sqlite:////"):
            Tracker.Config(uri=uri)
    with pytest.raises(ValueError, match="password"):
        Tracker.Config(uri="http://me:secret@host:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        tracker(tmp_path / "run")


def test_no_password_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000/x")
    tracker(tmp_path / "run").close("FINISHED")
    assert lines(tmp_path / "run")[0]["attempt"]["uri"] == "http://host:5000/x"
    assert "secret" not in (tmp_path / "run" / "journal.jsonl").read_text()


def test_the_run_itself_imports_neither_mlflow_nor_torch():
    code = "import sys, penstock.tracking, penstock.compare; assert not {'mlflow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
