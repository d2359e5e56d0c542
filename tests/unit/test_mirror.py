"""The mirror against real MLflow stores: a server that is killed, absent or silent, and SQLite files."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.tracking import Tracker, process
from penstock.tracking.commands import server_command, server_environment
from penstock.tracking.journal import read_lines
from penstock.tracking.mirror import Mirror, open_store, use_short_timeouts
from penstock.tracking.store import State
from tests.pool import free_port

PATIENCE = 90.0  # seconds for another process to get somewhere on a busy machine


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A SQLite store with MLflow's tables, made once: making them takes seconds."""
    use_short_timeouts()
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def runs(tmp_path, empty_store) -> Path:
    """A folder for runs with a store of its own."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


class Server:
    """An MLflow server as `penstock ui` starts it, that can be killed and started again at the same address."""

    def __init__(self, runs: Path):
        self.runs, self.port = runs, free_port()
        self.process: Any = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Server":
        self.process = subprocess.Popen(
            server_command(self.runs, self.port),
            env=server_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: self.answers("127.0.0.1") == 200)
        return self

    def answers(self, host: str) -> int:
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1")
        request.add_header("Host", f"{host}:{self.port}")
        try:
            return urllib.request.urlopen(request, timeout=5).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(empty_store, folder / "mlflow.db")
    running = Server(folder).start()
    yield running
    running.kill()


def wait_until(condition: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.1)


def tracker(folder: Path, uri: str | None = None, enabled: bool = True, params: dict | None = None) -> Tracker:
    config = Tracker.Config(uri=uri, enabled=enabled)
    return Tracker(config, folder, folder.name, params or {}, {}, True)


def journaled(folder: Path) -> dict[str, list[tuple[int, int, float]]]:
    """What MLflow should hold, read from the journal by other means: (step, time, value) of the finite values."""
    rows: dict[str, list[tuple[int, int, float]]] = {}
    for line in read_lines(folder / "journal.jsonl"):
        for name, value in line.get("metrics", {}).items():
            if not isinstance(value, str):
                rows.setdefault(name, []).append((line["step"], line["time"], value))
    return rows


def stored(store: Path, run_id: str) -> dict[str, list[tuple[int, int, float]]]:
    """What MLflow holds, read from its tables."""
    with sqlite3.connect(store) as connection:
        rows = connection.execute(
            "select key, step, timestamp, value from metrics where run_uuid = ? order by step, timestamp", (run_id,)
        ).fetchall()
    found: dict[str, list[tuple[int, int, float]]] = {}
    for name, *row in rows:
        found.setdefault(name, []).append(tuple(row))
    return found


def only_run(runs: Path, status: str | None = None) -> Any:
    client = open_store(f"sqlite:///{runs / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    (found,) = client.search_runs(experiments)
    assert status is None or found.info.status == status
    return found


class Unreliable:
    """A client whose every request fails twice: before it reaches the store, and after."""

    def __init__(self, client: Any, tried: Counter[str]):
        self.client, self.tried = client, tried

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            request = f"{name} {args} {kwargs}"
            self.tried[request] += 1
            if self.tried[request] == 1:
                raise ConnectionError("lost on the way")
            result = getattr(self.client, name)(*args, **kwargs)
            if self.tried[request] == 2:
                raise ConnectionError("the answer was lost")
            return result

        return call


def test_nothing_is_lost_or_doubled_when_every_request_fails_twice(runs, monkeypatch):
    monkeypatch.setattr("penstock.tracking.mirror.BATCH", 100)
    tried = Counter[str]()
    monkeypatch.setattr("penstock.tracking.mirror.open_store", lambda uri: Unreliable(open_store(uri), tried))
    folder = runs / "run"
    long = {"long": "x" * 7000, "odd@key%": 1, "empty": "", **{f"p{n}": n for n in range(150)}}
    run = tracker(folder, enabled=False, params=long)
    run.dataset("digits", "f" * 64, "/data/digits")
    rng = np.random.default_rng(0)
    mirror = Mirror(folder)
    for step in range(1, 201):
        run.log(
            step, {"train/loss": float(rng.normal()), "train/lr": 0.1, "eval/x": float("inf") if step == 7 else 1.0}
        )
        if step == 100:
            run.picture(step, "reconstruction", np.zeros((3, 4, 4), np.uint8))
            run.tag("note", "n" * 9000)
            run.event("checkpoint", step)
            deliver(mirror)
    run.close("FINISHED")
    mirror = Mirror(folder)  # another process goes on from the acknowledged byte
    deliver(mirror)
    found = only_run(runs, "FINISHED")
    assert stored(runs / "mlflow.db", found.info.run_id) == journaled(folder)
    assert [step for step, _, _ in journaled(folder)["eval/x"]] == [s for s in range(1, 201) if s != 7]
    assert journaled(folder)["health/nonfinite"][0][::2] == (7, 1.0)
    assert len(found.data.params) == len(long)
    assert found.data.params["long"] == "x" * 5997 + "..."
    assert found.data.params["odd_key_"] == "1"
    assert len(found.data.tags["note"]) == 8000
    assert found.data.tags["data.training.digest"] == "f" * 64
    assert [(each.dataset.name, each.dataset.digest) for each in found.inputs.dataset_inputs] == [("digits", "f" * 36)]
    picture = runs / "artifacts" / "penstock" / found.info.run_id / "artifacts/pictures/reconstruction/00000100.png"
    assert picture.read_bytes() == (folder / "pictures/reconstruction/00000100.png").read_bytes()


def deliver(mirror: Mirror) -> None:
    for _ in range(500):
        try:
            return mirror.send()
        except ConnectionError:
            pass
    raise AssertionError("no progress")


def test_a_file_that_cannot_be_sent_does_not_hold_up_the_metrics(runs, monkeypatch):
    folder = runs / "run"
    run = tracker(folder, enabled=False)
    (folder / "recipe.yaml").write_text("a: 1")
    run.artifact(folder / "recipe.yaml")
    run.log(1, {"train/loss": 1.0})
    run.close("FINISHED")
    (runs / "artifacts").write_text("in the way")
    with pytest.raises(InputError, match="MLflow did not take the run"):
        process.sync(folder)
    found = only_run(runs, "FINISHED")
    assert stored(runs / "mlflow.db", found.info.run_id) == journaled(folder)
    assert State.load(folder).owed == ["recipe.yaml"]
    (runs / "artifacts").unlink()
    process.sync(folder)
    assert State.load(folder).owed == [] and State.load(folder).trouble is None
    assert list(runs.rglob("artifacts/recipe.yaml"))


def test_sync_again_and_after_the_state_is_lost_or_the_runs_moved(runs, tmp_path):
    folder = runs / "run"
    run = tracker(folder, enabled=False)
    for step in range(5):
        run.log(step, {"train/loss": float(step)})
    run.close("FINISHED")
    run_id = process.sync(folder)
    assert process.sync(folder) == run_id
    only_run(runs, "FINISHED")
    (folder / "run.json").unlink()
    assert process.sync(folder) == run_id
    runs.rename(tmp_path / "moved")
    assert process.sync(tmp_path / "moved" / "run") == run_id
    assert stored(tmp_path / "moved" / "mlflow.db", run_id) == journaled(tmp_path / "moved" / "run")
    only_run(tmp_path / "moved", "FINISHED")


def test_a_server_killed_in_the_middle_holds_each_metric_once(server, tmp_path, capfd):
    """The run logs before, while and after the server is away; a second process replays and finishes it."""
    folder = tmp_path / "run"
    run = tracker(folder, server.uri)
    for step in range(1, 301):
        run.log(step, {"train/loss": step / 7, "perf/data_wait": 0.0})
    wait_until(lambda: State.load(folder).offset > 0)
    server.kill()
    for step in range(301, 601):
        run.log(step, {"train/loss": step / 7, "perf/data_wait": 0.0})
    server.start()
    for step in range(601, 701):
        run.log(step, {"train/loss": step / 7, "perf/data_wait": 0.0})
    run.close("FINISHED")
    process.sync(folder)  # whatever a busy machine did not send in time
    found = only_run(server.runs, "FINISHED")
    assert found.info.run_id == State.load(folder).run_id
    assert stored(server.runs / "mlflow.db", found.info.run_id) == journaled(folder)
    assert [row[0] for row in journaled(folder)["train/loss"]] == list(range(1, 701))


def test_the_server_answers_to_the_names_of_this_machine_only(server):
    assert server.answers("localhost") == server.answers("127.0.0.1") == 200
    assert server.answers(socket.gethostname()) == 200
    assert server.answers("evil.example") == 403


def test_a_silent_server_is_never_waited_for(tmp_path, capfd):
    """The server takes the connection and says nothing; the run logs on, and scheduler signals leave the mirror be."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        run = tracker(tmp_path / "run", f"http://127.0.0.1:{silent.getsockname()[1]}")
        connection, _ = silent.accept()  # the mirror now waits for an answer that never comes
        for step in range(1, 101):
            run.log(step, {"train/loss": float(step)})
        assert [row[0] for row in journaled(tmp_path / "run")["train/loss"]] == list(range(1, 101))
        mirror = run._mirror
        assert mirror is not None
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(mirror.pid, each)
        time.sleep(0.2)
        assert mirror.poll() is None
        mirror.kill()
        run.close("KILLED")
        connection.close()
    assert f"penstock sync {tmp_path / 'run'}" in capfd.readouterr().err


def test_an_absent_server_then_sync(tmp_path, runs):
    folder = tmp_path / "run"
    run = tracker(folder, f"http://127.0.0.1:{free_port()}", enabled=False)
    run.log(1, {"train/loss": 1.0})
    run.close("FINISHED")
    with pytest.raises(InputError, match="ConnectionRefusedError"):
        process.sync(folder)
    run_id = process.sync(folder, f"sqlite:///{runs / 'mlflow.db'}")
    assert stored(runs / "mlflow.db", run_id) == journaled(folder)


CRASH = """
import os, sys, time
from pathlib import Path
from penstock.tracking import Tracker
folder = Path(sys.argv[1])
run = Tracker(Tracker.Config(), folder, "run", {"lr": 0.1}, {}, True)
for step in range(1, 61):
    run.log(step, {"train/loss": step / 3})
print(run._mirror.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_fails_in_mlflow_and_its_resume_continues_it(runs):
    folder = runs / "run"
    crash = subprocess.run([sys.executable, "-c", CRASH, str(folder)], stdout=subprocess.PIPE, text=True)
    assert crash.returncode == -signal.SIGKILL
    wait_until(lambda: not alive(int(crash.stdout)))
    before = only_run(runs, "FAILED")
    assert stored(runs / "mlflow.db", before.info.run_id) == journaled(folder)
    run = tracker(folder, params={"lr": 0.2})
    for step in range(41, 101):  # the newest checkpoint was at step 40
        run.log(step, {"train/loss": step / 3})
    run.close("FINISHED")
    process.sync(folder)
    found = only_run(runs, "FINISHED")
    assert found.info.run_id == before.info.run_id
    history = stored(runs / "mlflow.db", found.info.run_id)["train/loss"]
    assert [(step, value) for step, _, value in history] == [(step, step / 3) for step in range(1, 101)]
    assert found.data.metrics["train/loss"] == 100 / 3
    assert found.data.params["lr"] == "0.1"
    assert found.data.tags["attempt"] == "2"
    assert found.data.tags["changed"] == "lr: 0.1 -> 0.2"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_runs_that_create_one_store_at_once(tmp_path):
    """A sweep's first runs find no store, no tables and no experiment, all at the same time."""
    started = [tracker(tmp_path / name) for name in ("a", "b")]
    for run in started:
        for step in range(20):
            run.log(step, {"train/loss": float(step)})
    for run in started:
        run.close("FINISHED")
    for run in started:
        process.sync(run.folder)
    client = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert sorted(each.name for each in client.search_experiments()) == ["Default", "penstock"]
    found = client.search_runs([client.get_experiment_by_name("penstock").experiment_id])
    assert {each.info.run_name for each in found} == {"a", "b"} and len(found) == 2
    for run in started:
        assert stored(tmp_path / "mlflow.db", State.load(run.folder).run_id) == journaled(run.folder)


def test_sync_leaves_a_live_mirror_alone(runs):
    folder = runs / "run"
    tracker(folder, enabled=False)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(InputError, match="sends its journal by itself"):
            process.sync(folder)
    finally:
        holder.kill()
        holder.communicate()


HOLD = """
import sys
from pathlib import Path
from penstock.tracking.process import sender_lock
lock = sender_lock(Path(sys.argv[1]))
print("held" if lock.take() else "taken", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_child_is_shown_under_its_parent_whichever_is_sent_first(runs, first):
    parent = tracker(runs / "parent", enabled=False)
    child = Tracker(Tracker.Config(enabled=False, parent=parent.id), runs / "child", "child", {}, {}, True)
    parent.close("FINISHED")
    child.close("FINISHED")
    other = {"parent": "child", "child": "parent"}[first]
    ids = {name: process.sync(runs / name) for name in (first, other)}
    client = open_store(f"sqlite:///{runs / 'mlflow.db'}")
    assert client.get_run(ids["child"]).data.tags["mlflow.parentRunId"] == ids["parent"]
    assert "mlflow.parentRunId" not in client.get_run(ids["parent"]).data.tags


def test_compare_reads_runs_from_mlflow(runs):
    from penstock import compare

    uri = f"sqlite:///{runs / 'mlflow.db'}"
    for name in ("a", "twin"):
        run = tracker(runs / name, enabled=False, params={"lr": name})
        run.log(1, {"final/knn_top1": 0.5})
        run.close("FINISHED")
    run_id = process.sync(runs / "a")
    process.sync(runs / "twin")
    by_name, by_id, folder = compare.load(["a", run_id, str(runs / "twin")], uri)
    assert by_name.params == by_id.params == {"lr": "a"}
    assert compare.results([by_name, folder]) == {"final/knn_top1": [0.5, 0.5]}
    assert compare.differences([by_name, folder]) == {"lr": ["a", "twin"]}
    with pytest.raises(InputError, match="neither a run folder nor a run"):
        compare.load(["nobody"], uri)
