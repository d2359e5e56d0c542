"""Tracking: every run writes its own journal, and a background process mirrors the journal to MLflow.

The mirror is a process, not a thread: importing MLflow and opening its store take seconds of Python during which a
thread would hold the interpreter's lock, and steps were seen to take forty times as long. It reads the journal from
the last acknowledged byte (`run.json`), sends it in batches with the journal's own timestamps (MLflow keeps equal
points once, so a batch sent twice counts once), and tries again when the server does not answer. Whatever is left
when a run ends, `penstock sync RUN` sends.

Metric names, in every stage, over optimizer steps:

    progress/samples, progress/epoch                 the other two axes
    train/loss, train/lr, train/grad_norm, train/*   means since the last report
    perf/images_per_second, perf/data_wait (share of the time, mean over ranks), perf/memory_gb
    perf/read_ms, perf/decode_ms, perf/augment_ms    a worker's time for an image
    perf/read_mb_per_second, perf/retries            over all ranks, as are the next
    perf/cache_hits, perf/fetched_mb_per_second      share of the shards or blocks that were there; over the network
    data/unreadable, data/unreadable_KIND            samples of weight 0 in this attempt, in all and by what was wrong
    eval/knn_top1, eval/linear_top1, eval/*          measured during the run
    health/std, health/effective_rank, health/*      feature health; health/nonfinite counts values that were not finite
    best/*, final/*                                  what runs are compared by
"""

import os
import posixpath
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from penstock.recipe import Block
from penstock.schedule import Duration, Length
from penstock.tracking.journal import NAME, PARENT, Journal, flatten, read_from, strict
from penstock.tracking.process import start_mirror, stop_mirror
from penstock.tracking.store import State, check_uri, recorded_uri

Status = Literal["FINISHED", "KILLED", "FAILED", "SCHEDULED"]  # the last: of a parent whose runs wait in a queue
METRIC_NAME = re.compile(r"\w[\w\-./ :]{0,249}")  # MLflow's rule


class Tracker:
    """What a training loop tells about its run. Only rank 0's is `active`; the others do nothing."""

    class Config(Block):
        experiment: str = Field("penstock", description="MLflow experiment that holds the run")
        uri: str | None = Field(None, description="MLflow store; else MLFLOW_TRACKING_URI, else ../mlflow.db")
        enabled: bool = Field(True, description="mirror the journal to MLflow while the run goes on")
        every: Duration = Field(Length(10, "steps"), description="how often metrics are written")
        parent: str | None = Field(
            None, pattern="^[0-9a-f]{32}$", description="id, in its journal, of the run that this one is shown under"
        )

        @field_validator("uri")
        @classmethod
        def _reachable(cls, uri: str | None) -> str | None:
            if uri is not None:
                check_uri(uri)
                if "@" in urlsplit(uri).netloc:
                    raise ValueError("a recipe is saved with its run, so no password in it; set MLFLOW_TRACKING_URI")
            return uri

    def __init__(
        self,
        config: Config,
        folder: Path,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        active: bool,
    ):
        """`params` is the resolved recipe, nested; `tags` what differs between attempts (job id, ranks).

        A folder with a journal is continued. Raises InputError where another process is writing the run.
        """
        self.folder, self.active = folder, active
        self._mirror: subprocess.Popen[bytes] | None = None
        self._names: set[str] = set()
        if not active:
            return
        uri = recorded_uri(config.uri)
        self.journal = Journal(folder)
        before = self.journal.attempts
        flat = flatten(params)
        first = before[0]["params"] if before else flat
        self.id: str = before[0]["id"] if before else uuid.uuid4().hex
        above = {PARENT: config.parent} if config.parent else {}
        self.journal.write(
            attempt={
                "id": self.id,
                "number": len(before) + 1,
                "name": name,
                "experiment": config.experiment,
                "uri": uri,
                "params": flat,
                "tags": {**origin(), **tags, **above, "attempt": str(len(before) + 1), "folder": str(folder.resolve())},
                "changed": {k: [first.get(k), flat.get(k)] for k in {*first, *flat} if first.get(k) != flat.get(k)},
            }
        )
        if (folder / "recipe.yaml").exists():
            self.artifact(folder / "recipe.yaml")
        if config.enabled:
            try:
                self._mirror = start_mirror(folder)
            except OSError as error:
                say(f"no mirror could be started ({error}); `penstock sync {folder}` sends the run later")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers after `step` optimizer steps; a (name, step) that the journal already has stays as it is."""
        if not self.active:
            return
        for name in metrics.keys() - self._names:
            if not METRIC_NAME.fullmatch(name) or posixpath.normpath(name) != name:
                raise ValueError(f"metric {name!r}: write group/name, with letters, digits and _-. : only")
            self._names.add(name)
        self.journal.metrics(step, metrics)

    def event(self, name: str, step: int, **data: Any) -> None:
        """Something worth knowing later (resumed, stopped, a step skipped); it stays in the journal."""
        if self.active:
            self.journal.write(step=step, event=name, data=strict(data))

    def picture(self, step: int, name: str, image: Any) -> None:
        """A uint8 tensor or array [3, H, W] or [H, W, 3], kept as pictures/NAME/STEP.png."""
        path = f"pictures/{name}/{step:08d}.png"
        if not self.active or not self.journal.is_new(path, step):
            return
        import numpy as np
        from PIL import Image

        pixels = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
        if pixels.shape[-1] != 3:
            pixels = pixels.transpose(1, 2, 0)
        try:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(self.folder / path)
        except OSError as error:
            say(f"{self.folder / path}: {error}; the run goes on without that picture")
            return
        self.journal.picture(step, path)

    def artifact(self, path: Path) -> None:
        """A file to show in MLflow; it is sent from where it lies."""
        if self.active:
            self.journal.write(artifact=os.path.relpath(path, self.folder))

    def tag(self, key: str, value: str) -> None:
        if self.active:
            self.journal.write(tag={key: str(value)})

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """The data the run stands on: a manifest's digest and where it lies."""
        if self.active:
            self.journal.write(dataset={"name": name, "digest": digest, "source": source, "context": context})
            self.tag(f"data.{context}.digest", digest)

    def flush(self) -> None:
        """The journal onto the disk itself; call before a checkpoint counts as complete. Raises OSError."""
        if self.active:
            self.journal.flush()

    def close(self, status: Status) -> None:
        """Write the run's end, and wait a bounded time for the mirror. Says so when something is left to send."""
        if not self.active:
            return
        self.active = False
        self.journal.write(status=status)
        if self._mirror:
            stop_mirror(self._mirror)
            state = State.load(self.folder)
            left = sum(1 for _ in read_from(self.folder / NAME, state.offset)) + len(state.owed)
            if left:
                why = state.trouble or "it was too slow"
                say(f"{left} journal lines are not in MLflow yet ({why}); `penstock sync {self.folder}` sends them")
        self.journal.close()


def say(text: str) -> None:
    print(f"tracking: {text}", file=sys.stderr, flush=True)


def origin() -> dict[str, str]:
    """Tags that say where an attempt ran: commit of the checkout, whether it was changed, ranks, Slurm job.

    A job that runs a frozen copy of the code is told the commit it was made of (PENSTOCK_COMMIT, PENSTOCK_DIRTY).
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    variables = {
        "world_size": "WORLD_SIZE",
        "git.commit": "PENSTOCK_COMMIT",
        "git.dirty": "PENSTOCK_DIRTY",
        "slurm.job_id": "SLURM_JOB_ID",
        "slurm.job_name": "SLURM_JOB_NAME",
        "slurm.nodes": "SLURM_JOB_NODELIST",
        "slurm.restarts": "SLURM_RESTART_COUNT",
        "slurm.array_job_id": "SLURM_ARRAY_JOB_ID",
    }
    tags = {tag: os.environ[variable] for tag, variable in variables.items() if variable in os.environ}
    if "git.commit" in tags:
        return tags
    try:
        tags["git.commit"] = git("rev-parse", "HEAD")
        tags["git.dirty"] = str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower()
    except (OSError, subprocess.SubprocessError):
        pass  # not a checkout
    return tags
