"""A tiny run as a Slurm job of two nodes, slowed down and interrupted as a test likes, and what it left behind."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from penstock.streams.positions.ledger import read_ledger
from penstock.tracking.journal import read_lines
from tests.runs.runner import history
from tests.slurm.cluster import Cluster, until

STEPS, BATCH, EVERY = 24, 32, 5  # of the recipe; a checkpoint every 5 steps
SLOW, FAST = 0.05, 0.0  # seconds for each sample of a rank, which has half of the batch


@dataclass
class Job:
    """`sbatch --nodes 2 slurm/pretrain.sbatch RECIPE`, its run in `folder`."""

    cluster: Cluster
    folder: Path
    recipe: Path
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = self.folder / "run"
        self.folder.mkdir(exist_ok=True)

    def submit(self, pace: float = FAST) -> "Job":
        self.pace(pace)
        options = ("--nodes=2", "--cpus-per-task=1", "--exclusive", f"--output={self.words}", *self.options)
        stage = "tests.slurm.pace:pace"
        own = (f"out={self.folder}", f"data.stages=[{stage}]", "data.workers=1", *self.overrides)
        environment = {
            "PACE": str(self.folder / "pace"),
            "PENSTOCK_PYTHON": sys.executable,
            "PENSTOCK_LOGS": str(self.folder / "logs"),
            "CUDA_VISIBLE_DEVICES": "",
            **self.environment,
        }
        self.id = self.cluster.sbatch(*options, "slurm/pretrain.sbatch", str(self.recipe), *own, **environment)
        return self

    @property
    def words(self) -> Path:
        return self.folder / "job.out"

    def pace(self, seconds: float) -> None:
        partial = self.folder / ".pace"
        partial.write_text(str(seconds))
        partial.replace(self.folder / "pace")

    def reach(self, step: int) -> None:
        """Until a rank of the newest start has done the step."""

        def there() -> bool:
            assert self.cluster.state(self.id) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), self.told()
            return f'"step": {step},' in "".join(file.read_text() for file in self.run.glob("ledger/*.jsonl"))

        until(there, 90, f"step {step} of job {self.id}\n{self.told()}")

    def end(self, restarts: int, state: str = "COMPLETED", timeout: float = 150) -> None:
        """Until the job is at its end, after so many restarts."""
        try:
            ended = self.cluster.wait(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None
        assert (ended, self.cluster.restarts(self.id)) == (state, restarts), self.told()

    def told(self) -> str:
        """Everything that the job and its ranks said."""
        files = [self.words, *sorted(self.folder.glob("logs/**/rank-*.log"))]
        return "\n".join(f"--- {file}\n{file.read_text()}" for file in files if file.exists())

    # What it left behind ------------------------------------------------------------------------------------------

    def weights(self) -> bytes:
        return (self.run / "export/model.safetensors").read_bytes()

    def keys(self) -> dict[int, list[str]]:
        ledger = read_ledger(self.run / "ledger")
        return {step: sorted(key for record in records for key in record["keys"]) for step, records in ledger.items()}

    def history(self) -> dict[tuple[str, int], float]:
        return history(self.run)

    def starts(self) -> list[tuple[int, int]]:
        """(step it began at, last step it did) of each start that trained."""
        found = []
        for file in sorted(self.run.glob("ledger/attempt-*-rank-00000.jsonl")):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            if len(lines) > 1:
                found.append((lines[0]["since_step"], lines[-1]["step"]))
        return found

    def jobs(self) -> list[str | None]:
        """The Slurm job of each start, as tracked."""
        lines = [line["attempt"] for line in read_lines(self.run / "journal.jsonl") if "attempt" in line]
        return [line["tags"].get("slurm.job_id") for line in lines]


def same_run(broken: Job, unbroken: Job) -> None:
    """Nothing was lost, repeated or changed by what happened in between."""
    assert broken.keys() == unbroken.keys()
    assert broken.history() == unbroken.history()
    assert broken.weights() == unbroken.weights()
