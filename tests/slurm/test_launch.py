"""`python -m launch` on a real Slurm: jobs, arrays, pipelines, and what is refused before it reaches the queue."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.tracking.journal import read_lines, read_run
from tests.slurm.cluster import ROOT, Cluster

TINY = """
duration: 6 steps
batch: 32
data: {{train: {digits}/train, val: {digits}/val, workers: 0}}
augment: {{name: none, size: 16}}
backbone:
  name: vit_tiny_patch16_224
  size: 16
  options: {{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}}
  pool: avg
optim: {{lr: 1.0e-3}}
engine: {{precision: fp32}}
monitor: {{at_start: false, pictures: null}}
tracking: {{every: 3 steps}}
name: run
"""
MAE = "method: {name: mae, decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}\n"
ONE_NODE = ("--nodes=1", "--cpus=2", "--sbatch=--exclusive")


@pytest.fixture(scope="module")
def recipes(recipe) -> Path:
    """A folder with pretrain.yaml and finetune.yaml."""
    text = TINY.format(digits=recipe.parent)
    (recipe.parent / "pretrain.yaml").write_text(text + MAE)
    (recipe.parent / "finetune.yaml").write_text(text)
    return recipe.parent


def launch(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *words]
    environment = {**cluster.environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def job_in(folder: Path) -> str:
    return json.loads((folder / "jobs/0001/job.json").read_text())["job"]


def words_of(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted((folder / "logs").glob("**/*.*")) if file.is_file())


def test_a_job_runs_what_was_sent_and_knows_its_mlflow_run(cluster, recipes, tmp_path):
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text((recipes / "pretrain.yaml").read_text())
    words = ("slurm", "pretrain", str(recipe), f"out={tmp_path}", *ONE_NODE, "--nodes=4")
    sent = launch(cluster, *words, "--sbatch=--hold")
    assert sent.returncode == 0, sent.stderr
    recipe.write_text("changed: meanwhile")
    marker = tmp_path / "marker"
    main = run / "jobs/0001/code/pretrain/__main__.py"
    main.write_text(f"open({str(marker)!r}, 'w')\n{main.read_text()}")
    twice = launch(cluster, "slurm", "pretrain", str(recipes / "pretrain.yaml"), f"out={tmp_path}", *ONE_NODE)
    assert twice.returncode == 2 and "has a job in the queue" in twice.stderr
    assert "pending" in launch(cluster, "status", str(tmp_path)).stdout

    job = job_in(run)
    cluster.say("scontrol", "release", job)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", words_of(run)
    assert marker.exists(), "the job ran other code than the frozen"
    tags = read_run(run).tags
    assert (tags["slurm.job_id"], tags["slurm.job_name"], tags["world_size"]) == (job, "run", "4")
    mlflow = json.loads((run / "run.json").read_text())["run_id"]
    assert f"MLflow {mlflow}" in cluster.say("scontrol", "show", "job", job)
    assert "100%" in launch(cluster, "status", str(run)).stdout
    assert "training" in launch(cluster, "logs", str(run), "--no-follow").stdout


def test_what_is_wrong_never_reaches_the_queue(cluster, recipes, tmp_path):
    recipe = str(recipes / "pretrain.yaml")
    before = cluster.say("squeue", "--noheader")
    for words, message in (
        (("batc=3",), "did you mean 'batch'"),
        (("--nodes=3",), "not a multiple of 3"),
        (("--cluster=nowhere",), "nowhere"),
        (("--partition=nowhere",), "invalid partition"),
    ):
        refused = launch(cluster, "slurm", "pretrain", recipe, f"out={tmp_path}/out", *words)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    assert cluster.say("squeue", "--noheader") == before and not (tmp_path / "out").exists()


def test_a_sweep_is_an_array_that_keeps_to_its_limit(cluster, recipes, tmp_path):
    recipe = str(recipes / "pretrain.yaml")
    sent = launch(cluster, "slurm", "pretrain", recipe, f"out={tmp_path}", "--sweep=seed=0,1", "--limit=1", *ONE_NODE)
    assert sent.returncode == 0, sent.stderr
    folder = tmp_path / "run-sweep"
    job = job_in(folder)
    for task in ("0", "1"):
        assert cluster.wait(f"{job}_{task}", "COMPLETED", "FAILED") == "COMPLETED", words_of(folder)
    spans = []
    for seed in ("0", "1"):
        times = [line["time"] for line in read_lines(folder / f"seed={seed}" / "journal.jsonl")]
        spans.append((min(times), max(times)))
        assert read_run(folder / f"seed={seed}").params["seed"] == seed
    assert sorted(spans)[0][1] < sorted(spans)[1][0], "two tasks of the array ran at once"


def test_a_pipeline_waits_step_for_step_and_has_one_parent(cluster, recipes, tmp_path):
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(
        f"name: line\nout: {tmp_path}\nsteps:\n"
        f"  first: {{stage: pretrain, recipe: {recipes}/pretrain.yaml}}\n"
        f"  second: {{stage: finetune, recipe: {recipes}/finetune.yaml, weights: first}}\n"
    )
    folder = tmp_path / "line"
    sent = launch(cluster, "pipeline", str(pipeline), "--slurm", *ONE_NODE)
    assert sent.returncode == 0, sent.stderr
    waiting = cluster.say("scontrol", "show", "job", job_in(folder / "second"))
    assert f"afterok:{job_in(folder / 'first')}" in waiting
    assert cluster.wait(job_in(folder), "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", (
        words_of(folder) + words_of(folder / "first") + words_of(folder / "second")
    )
    parent, second = read_run(folder), read_run(folder / "second")
    assert parent.status == second.status == "FINISHED"
    assert parent.tags["lineage.second"] == "first"
    assert second.params["backbone.weights"] == str(folder / "first/export")
    assert second.tags["parent"] == read_run(folder / "first").tags["parent"]
    again = launch(cluster, "pipeline", str(pipeline), "--slurm", *ONE_NODE)
    assert again.returncode == 0 and "job" not in again.stdout, "what is finished was sent again"


def test_an_ablation_goes_out_as_an_array_and_shows_itself(cluster, recipes, tmp_path):
    words = (
        *("ablate", str(recipes / "finetune.yaml"), "--over=label_smoothing:loss.smoothing=0", "--seeds=1"),
        *("--leave-one-out", "--slurm", "--limit=2", *ONE_NODE, "loss.smoothing=0.1", f"out={tmp_path}"),
    )
    sent = launch(cluster, *words)
    assert sent.returncode == 0 and "2 runs in the array" in sent.stdout, sent.stdout + sent.stderr
    folder = tmp_path / "run-ablation"
    assert read_run(folder).status == "SCHEDULED"
    twice = launch(cluster, *words)
    assert twice.returncode == 2 and "in the queue" in twice.stderr, twice.stderr
    end = json.loads((folder / "jobs/0002/job.json").read_text())["job"]
    assert cluster.wait(end, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", words_of(folder)
    assert read_run(folder).status == "FINISHED" and (folder / "report.json").is_file()
