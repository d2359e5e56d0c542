"""What slurm/train.sh makes of the ends that a run can have; the run is a few lines of shell instead of training."""

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import until

# In place of python: what torchrun would start; it ends as the file `end` says.
FAKE = """#!/usr/bin/env bash
cd {folder}
trap 'echo 75 >"$PENSTOCK_EXIT_FILE"; exit 75' TERM
echo "start $ATTEMPT_LOGS" >>started
for _ in $(seq 600); do
    [[ -e $PENSTOCK_STOP_FILE ]] && { echo 75 >"$PENSTOCK_EXIT_FILE"; exit 75; }
    if [[ -e end ]]; then
        code=$(cat end)
        [[ $code == crash ]] && exit 1
        echo "$code" >"$PENSTOCK_EXIT_FILE"
        exit "$code"
    fi
    sleep 0.1
done
"""


class Fake:
    def __init__(self, cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        python = folder / "python"
        python.write_text(FAKE.replace("{folder}", str(folder)))
        python.chmod(0o755)

    def submit(self, *options: str) -> str:
        environment = {"PENSTOCK_PYTHON": str(self.folder / "python"), "PENSTOCK_LOGS": str(self.folder / "logs")}
        options = (f"--output={self.folder / 'words'}", "--exclusive", *options)
        return self.cluster.sbatch(*options, "slurm/finetune.sbatch", "RECIPE", **environment)

    def end(self, code: str) -> None:
        (self.folder / "end").write_text(code)

    @property
    def starts(self) -> int:
        started = self.folder / "started"
        return len(started.read_text().splitlines()) if started.exists() else 0


@pytest.fixture
def fake(cluster, tmp_path) -> Fake:
    return Fake(cluster, tmp_path)


@pytest.mark.parametrize("code,state", [("0", "COMPLETED"), ("2", "FAILED"), ("3", "FAILED"), ("75", "FAILED")])
def test_an_end_that_another_start_would_not_change(cluster, fake, code, state):
    """75 is a person's stop file in the run's folder: the job ends, too, as the job itself was not asked."""
    fake.end(code)
    job = fake.submit("--nodes=1")
    cluster.wait(job, "COMPLETED", "FAILED")
    time.sleep(1)
    assert (cluster.state(job), cluster.restarts(job), fake.starts) == (state, 0, 1)
    assert f"ExitCode={code}:0" in cluster.say("scontrol", "show", "job", job)


def test_crashes_are_tried_again_but_not_forever(cluster, fake):
    fake.end("crash")
    job = fake.submit("--nodes=1")
    assert cluster.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert (cluster.restarts(job), fake.starts) == (2, 3)
    assert "crashed 3 times in a row" in (fake.folder / "words").read_text()


def test_a_cancelled_job_stays_away(cluster, fake):
    job = fake.submit("--nodes=2")
    until(lambda: fake.starts == 2, 30, "both nodes to start")
    cluster.say("scancel", job)
    cluster.wait(job, "CANCELLED")
    time.sleep(8)
    assert cluster.state(job) == "CANCELLED" and fake.starts == 2


def test_a_task_of_an_array_goes_back_alone(cluster, fake):
    """The last task carries the id of the whole array."""
    job = fake.submit("--nodes=1", "--array=0-1")
    until(lambda: fake.starts == 2, 30, "both tasks to start")
    cluster.say("scancel", "--batch", "--signal=USR1", f"{job}_1")
    until(lambda: fake.starts == 3, 30, "the task to start again")
    fake.end("0")
    states = [cluster.wait(f"{job}_{task}", "COMPLETED", "FAILED") for task in (0, 1)]
    assert states == ["COMPLETED"] * 2
    assert [cluster.restarts(f"{job}_{task}") for task in (0, 1)] == [0, 1]


def test_a_preemption_long_ago_does_not_bring_back_a_run_that_a_person_stopped(cluster, fake):
    job = fake.submit("--nodes=1")
    until(lambda: fake.starts == 1, 30, "the job to start")
    urgent = cluster.sbatch("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait(urgent, "COMPLETED")
    until(lambda: fake.starts == 2, 30, "the job to start again")
    fake.end("75")
    assert cluster.wait(job, "COMPLETED", "FAILED", "PENDING") == "FAILED"
    assert cluster.restarts(job) == 1


def test_a_chain_of_scripts(cluster, fake):
    """slurm/pipeline.sh: each step waits for the one before it, and goes when that one fails."""
    fake.end("2")
    environment = {
        **cluster.environment,
        "PENSTOCK_PYTHON": str(fake.folder / "python"),
        "PENSTOCK_LOGS": str(fake.folder / "logs"),
        "SBATCH_OUTPUT": str(fake.folder / "words"),
    }
    told = cluster.say("bash", "slurm/pipeline.sh", "A", "B", "C", environment=environment)
    jobs = [line.split()[-1] for line in told.splitlines()]
    assert len(jobs) == 3 and cluster.wait(jobs[0], "FAILED", "COMPLETED") == "FAILED"
    assert cluster.wait(jobs[1], "CANCELLED") and cluster.wait(jobs[2], "CANCELLED")
    assert fake.starts == 1
