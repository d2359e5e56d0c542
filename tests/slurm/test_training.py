"""Training on a real Slurm, and whatever a cluster does to a job meanwhile."""

import pytest

from penstock.tracking.journal import read_run
from penstock.tracking.mirror import open_store
from tests.slurm.job import EVERY, SLOW, STEPS, Job, same_run

VERY_SLOW = 0.1  # a step takes 1.6 s, an evaluation 13 s, the run more than two starts of a minute have for it


@pytest.fixture(scope="module")
def unbroken(cluster, recipe, tmp_path_factory) -> Job:
    job = Job(cluster, tmp_path_factory.mktemp("unbroken"), recipe).submit()
    job.end(restarts=0)
    return job


def test_a_job_trains_on_two_nodes(unbroken):
    assert sorted(unbroken.keys()) == list(range(STEPS))
    assert unbroken.weights() and unbroken.jobs() == [unbroken.id]
    logs = unbroken.folder / "logs" / unbroken.id / "0"
    assert sorted(file.name for file in logs.glob("rank-*.log")) == ["rank-0.log", "rank-1.log"]
    assert (logs / "rank-0.log").read_text() in unbroken.words.read_text()


def test_time_limit_twice_and_done_on_the_third_start(cluster, recipe, unbroken, tmp_path):
    job = Job(cluster, tmp_path / "job", recipe, ("--time=1", "--signal=B:USR1@25")).submit(VERY_SLOW)
    for restarts in (1, 2):
        cluster.wait(job.id, "RUNNING")
        cluster.wait(job.id, "PENDING", timeout=90)
        assert cluster.restarts(job.id) == restarts, job.told()
    cluster.say("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    job.pace(0)
    job.end(restarts=2)
    first, second, third = job.starts()
    assert first[1] + 1 == second[0] and second[1] + 1 == third[0], "a step was lost after a signal"
    assert job.words.read_text().count("stopped, and saved; back into the queue") == 2
    same_run(job, unbroken)


def test_preempted_then_requeued_by_hand_then_a_node_dies(cluster, recipe, unbroken, tmp_path):
    job = Job(cluster, tmp_path / "job", recipe, overrides=("tracking.enabled=true",)).submit(SLOW)
    job.reach(3)
    urgent = cluster.sbatch("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait(urgent, "COMPLETED")
    assert "Terminated" not in job.words.read_text().partition("back into the queue")[0], "srun cut the saving short"

    job.reach(9)
    cluster.say("scontrol", "requeue", job.id)
    cluster.wait(job.id, "PENDING")

    job.reach(17)
    cluster.kill_node("n1")
    job.pace(0)
    job.end(restarts=3)
    cluster.start_node("n1")

    preempted, requeued, killed, last = job.starts()
    assert preempted[1] + 1 == requeued[0], "a step was lost in a preemption"
    assert requeued[1] + 1 == killed[0], "a step was lost in a requeue"
    assert killed[1] + 1 - last[0] <= EVERY + 1, "more than one checkpoint interval was lost with a node"
    same_run(job, unbroken)
    one_mlflow_run(job)


def one_mlflow_run(job: Job) -> None:
    """What MLflow shows is the journal, each point once."""
    store = open_store(f"sqlite:///{job.folder / 'mlflow.db'}")
    (experiment,) = [one for one in store.search_experiments() if one.name == "penstock"]
    (shown,) = store.search_runs([experiment.experiment_id])
    assert shown.info.status == "FINISHED" and shown.data.tags["slurm.job_id"] == job.id
    for name, points in read_run(job.run).series.items():
        kept = [(point.step, point.value) for point in store.get_metric_history(shown.info.run_id, name)]
        assert sorted(kept) == sorted(points), name
