"""Sends a run's journal to MLflow, exactly once however often it is tried."""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.errors import InputError
from penstock.tracking.journal import NAME, PARENT, Lock, is_live, read_from
from penstock.tracking.store import State, actual_uri, sqlite_path, without_password

BATCH, SMALLEST_BATCH = 1000, 50  # metrics a request; 1000 is MLflow's limit
PARAM_LENGTH, TAG_LENGTH, PER_REQUEST = 6000, 8000, 100  # MLflow's limits
STORE_WAIT = 60.0  # seconds; creating the tables of a SQLite store takes about three


class Mirror:
    """Sends a run's journal to MLflow. Every call may raise what MLflow raises; calling again goes on from there."""

    def __init__(self, folder: Path, uri: str | None = None):
        self.folder, self.uri, self.journal = folder, uri, folder / NAME
        self.state = State.load(folder)
        self.batch = BATCH
        self.ended = False  # the newest thing the journal says is that the run has ended
        self._client: Any = None

    def send(self) -> None:
        """Everything the journal holds now."""
        if not self.journal.exists():
            return
        try:
            with self.journal.open("rb+") as file:
                os.fsync(file.fileno())  # a line must not reach MLflow and then be lost here in a power cut
            self._connect()
            self._send_lines()
            self._send_owed()
        except Exception as error:
            self.batch = max(SMALLEST_BATCH, self.batch // 2)
            self.state.trouble = reason(error)
            self.state.save(self.folder)
            raise
        if self.state.trouble and not self.state.owed:
            self.state.trouble = None
            self.state.save(self.folder)

    def fail_if_crashed(self) -> None:
        """A run that nobody writes any more and that never said how it ended has failed."""
        if self._client and not self.ended and not is_live(self.folder):
            self._client.set_terminated(self.state.run_id, "FAILED")

    def _connect(self) -> None:
        if self._client:
            return
        marks = [line for line, _ in read_from(self.journal, 0) if "attempt" in line or "status" in line]
        attempts = [line["attempt"] for line in marks if "attempt" in line]
        if not attempts:
            raise InputError(f"{self.journal} names no run")
        self.ended = "status" in marks[-1]
        uri = self.uri or actual_uri(attempts[-1]["uri"], self.folder.parent)
        client = open_store(uri)
        if self.state.run_id is None or self.state.uri != without_password(uri):
            run_id = find_or_create_run(client, uri, attempts[0], attempts[-1], marks[0]["time"])
            self.state = State(uri=without_password(uri), run_id=run_id)
        size = self.journal.stat().st_size
        with self.journal.open("rb") as file:
            file.seek(max(self.state.offset - 1, 0))
            if self.state.offset > size or (self.state.offset > 0 and file.read(1) != b"\n"):
                self.state.offset = 0  # the journal was replaced; what MLflow has already, it keeps once
        self.state.save(self.folder)
        self._client = client

    def _send_lines(self) -> None:
        from mlflow.entities import Metric

        waiting: list[Any] = []
        offset = self.state.offset
        for line, offset in read_from(self.journal, self.state.offset):
            if "metrics" in line:
                waiting += [
                    Metric(name, float(value), line["time"], line["step"])
                    for name, value in line["metrics"].items()
                    if not isinstance(value, str)  # one infinite point makes a chart unreadable
                ]
                if len(waiting) < self.batch:
                    continue
            elif "event" in line:
                continue
            self._send_metrics(waiting)
            waiting = []
            self._send_line(line)
            self._acknowledge(offset)
        self._send_metrics(waiting)
        self._acknowledge(offset)

    def _send_metrics(self, metrics: list[Any]) -> None:
        for start in range(0, len(metrics), self.batch):
            self._client.log_batch(self.state.run_id, metrics=metrics[start : start + self.batch])
        if metrics:
            self.batch = min(BATCH, self.batch * 2)

    def _acknowledge(self, offset: int) -> None:
        if offset != self.state.offset:
            self.state.offset = offset
            self.state.save(self.folder)

    def _send_line(self, line: dict[str, Any]) -> None:
        """Anything that is not metrics; all of it may be sent twice."""
        if "attempt" in line:
            self._send_attempt(line["attempt"])
        elif "tag" in line:
            self._send_tags(line["tag"])
        elif "dataset" in line:
            self._send_dataset(**line["dataset"])
        elif "picture" in line or "artifact" in line:
            name = line.get("picture") or line["artifact"]
            self.state.owed += [name] if name not in self.state.owed else []
        elif "status" in line:
            self.ended = True
            if line["status"] == "SCHEDULED":
                self._client.update_run(self.state.run_id, status="SCHEDULED")
            else:
                self._client.set_terminated(self.state.run_id, line["status"], line["time"])

    def _send_attempt(self, attempt: dict[str, Any]) -> None:
        from mlflow.entities import Param

        self.ended = False
        self._client.update_run(self.state.run_id, status="RUNNING")
        if attempt["number"] == 1:  # MLflow's parameters never change; later attempts' go into a tag
            params = [Param(clean_key(k), cut(v, PARAM_LENGTH)) for k, v in attempt["params"].items()]
            for start in range(0, len(params), PER_REQUEST):
                self._client.log_batch(self.state.run_id, params=params[start : start + PER_REQUEST])
        changed = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in sorted(attempt["changed"].items()))
        self._send_tags({**attempt["tags"], **({"changed": changed} if changed else {})})
        self._link(attempt["id"], attempt["tags"].get(PARENT))

    def _link(self, own: str, parent: str | None) -> None:
        """MLflow's own mark of parent and child. Whichever of them is sent last finds the other."""
        for above in self._runs_with("penstock.id", parent) if parent else []:
            self._client.set_tag(self.state.run_id, "mlflow.parentRunId", above)
        for below in self._runs_with(PARENT, own):
            self._client.set_tag(below, "mlflow.parentRunId", self.state.run_id)

    def _runs_with(self, tag: str, value: str) -> list[str]:
        """Ids of the runs in this run's experiment that carry a tag."""
        experiment = self._client.get_run(self.state.run_id).info.experiment_id
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1000)
        return [run.info.run_id for run in found]

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        listed = [RunTag(clean_key(key), cut(value, TAG_LENGTH)) for key, value in tags.items()]
        for start in range(0, len(listed), PER_REQUEST):
            self._client.log_batch(self.state.run_id, tags=listed[start : start + PER_REQUEST])

    def _send_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name[:500], digest[:36], "local", json.dumps({"uri": source}))
        self._client.log_inputs(self.state.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def _send_owed(self) -> None:
        """Files go last: an artifact store that refuses them must not hold up the metrics."""
        for name in list(self.state.owed):
            path = self.folder / name
            if path.is_file():
                inside = str(Path(name).parent)
                self._client.log_artifact(self.state.run_id, str(path), None if inside.startswith(".") else inside)
            else:
                print(f"{path}: was to be shown in MLflow and is gone", file=sys.stderr, flush=True)
            self.state.owed.remove(name)
            self.state.save(self.folder)


def reason(error: BaseException) -> str:
    """The innermost cause in a line: 'connection refused' lies four exceptions deep."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return cut(" ".join(f"{type(error).__name__}: {error}".split()), 300)


def clean_key(key: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", key)[:250]


def cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 3] + "..."


def use_short_timeouts() -> None:
    """For a process of its own: MLflow's defaults make one call to a dead server last four minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    os.environ["GIT_PYTHON_REFRESH"] = "quiet"
    logging.disable(logging.INFO)


def open_store(uri: str) -> Any:
    """A client of the store. A SQLite store is made beside its place and moved there complete.

    Two processes that make its tables at once, or one that is killed at it, leave a file that MLflow cannot open.
    """
    from mlflow.tracking import MlflowClient

    path = sqlite_path(uri)
    if path is None or path.exists():
        return MlflowClient(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(path.with_name(f".{path.name}.lock"))
    if not lock.take(wait=STORE_WAIT):
        raise TimeoutError(f"{path} is being made by another process")
    try:
        if not path.exists():
            unfinished = path.with_name(f".{path.name}.unfinished")
            unfinished.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{unfinished}")
            unfinished.rename(path)
    finally:
        lock.release()
    return MlflowClient(uri)


def find_or_create_run(client: Any, uri: str, first: dict[str, Any], newest: dict[str, Any], started: int) -> str:
    """The run that carries this journal's id (a creation whose answer was lost, a store that moved), or a new one."""
    experiment = client.get_experiment_by_name(newest["experiment"])
    if experiment is None:
        path = sqlite_path(uri)
        place = (path.parent / "artifacts" / clean_key(newest["experiment"])).as_uri() if path else None
        try:
            experiment_id = client.create_experiment(newest["experiment"], artifact_location=place)
        except Exception:  # another run was faster
            experiment = client.get_experiment_by_name(newest["experiment"])
            if experiment is None:
                raise
    if experiment is not None:
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], f"tags.`penstock.id` = '{first['id']}'", max_results=1)
    if found:
        return found[0].info.run_id
    tags = {"penstock.id": first["id"]}
    return client.create_run(experiment_id, start_time=started, tags=tags, run_name=newest["name"]).info.run_id
