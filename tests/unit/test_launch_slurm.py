"""`launch slurm`, `pipeline`, `status` without a Slurm: scripts as they are written, mistakes as they are named."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import cluster, look, pipeline, slurm
from launch.cluster import Cluster, cluster_of
from launch.submission import ROOT, Submission, check_ranks, send, shown_under
from penstock.errors import DONE, InputError
from penstock.recipe import check, load
from penstock.signals import LOOK_EVERY, Stop
from penstock.tracking import Tracker
from penstock.tracking.journal import read_run

RECIPE = {"batch": 64, "engine": {"accumulation": 2}, "tracking": {"enabled": False}}


def sbatch_options(script: str) -> dict[str, str]:
    """As sbatch reads them: lines before the first command, the last of a name winning."""
    found = {}
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH ").strip("'").partition("=")
            found[name] = value
    return found


def submission(folder: Path, **given) -> Submission:
    asked = Cluster(nodes=4, gpus=8, time="1:00:00", signal=300, env={"A": "two words"}, setup=["module load cuda"])
    return Submission("pretrain", folder, "run", given.pop("recipes", [RECIPE]), asked, "the command", **given)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_scripts_are_shellcheck_clean(tmp_path):
    made = tmp_path / "job.sbatch"
    made.write_text(submission(tmp_path / "run").script(tmp_path / "run/jobs/0001"))
    scripts = [*sorted((ROOT / "slurm").glob("*.s*")), made]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and len(scripts) >= 6, done.stdout


def test_a_script_has_the_options_of_its_job_and_those_of_its_stage(tmp_path):
    script = submission(tmp_path / "run").script(tmp_path / "run/jobs/0001")
    options = sbatch_options(script)
    assert {name: options[name] for name in ("--nodes", "--gpus-per-node", "--time", "--signal", "--job-name")} == {
        "--nodes": "4",
        "--gpus-per-node": "8",
        "--time": "1:00:00",
        "--signal": "B:USR1@300",
        "--job-name": "run",
    }
    assert options["--open-mode"] == "append" and "--requeue" in options
    assert options["--output"] == f"{tmp_path}/run/logs/%j.out"
    lines = script.splitlines()
    assert "export A='two words'" in lines and lines[-1] == 'train pretrain "$@"'
    assert lines.index("module load cuda") < lines.index(f"set -- {tmp_path}/run/jobs/0001/recipe-0.yaml")


def test_an_array_has_a_recipe_for_each_task(tmp_path):
    sweep = submission(tmp_path / "run 100%", recipes=[RECIPE] * 3, array=True, limit=2)
    script = sweep.script(tmp_path / "run 100%/jobs/0001")
    options = sbatch_options(script)
    assert options["--array"] == "0-2%2" and options["--output"].endswith("/run 100%%/logs/%A_%a.out")
    assert f"set -- '{tmp_path}/run 100%/jobs/0001/'recipe-$SLURM_ARRAY_TASK_ID.yaml" in script.splitlines()
    assert "PENSTOCK_RUN" not in script


def test_code_and_recipe_are_frozen_and_taken_back_when_the_queue_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.submission.submit", lambda script, after: "7")
    run = tmp_path / "runs/run"
    assert send(run, lambda place: f"at {place}", [RECIPE], ["5"]) == "7"
    place = run / "jobs/0001"
    assert json.loads((place / "job.json").read_text()) == {"job": "7", "after": ["5"]}
    assert load(place / "recipe-0.yaml").values == RECIPE
    for file in ("penstock/trainer.py", "pretrain/__main__.py", "finetune/__main__.py", "slurm/train.sh"):
        assert (place / "code" / file).read_bytes() == (ROOT / file).read_bytes()
    assert not list(place.rglob("__pycache__"))

    def refuse(script: Path, after: Sequence[str]) -> str:
        raise InputError("no")

    monkeypatch.setattr("launch.submission.submit", refuse)
    with pytest.raises(InputError):
        send(tmp_path / "others/run", lambda place: "", [RECIPE], [])
    assert not (tmp_path / "others").exists()


def test_ranks_that_do_not_divide_the_batch_are_named():
    check_ranks(RECIPE, Cluster(nodes=4, gpus=8))
    with pytest.raises(InputError, match=r"64 is not a multiple of 96, the 48 ranks of 6 nodes .*; 96 would be"):
        check_ranks(RECIPE, Cluster(nodes=6, gpus=8))


@pytest.mark.parametrize(
    "text,words",
    [
        ("node: 4", "did you mean 'nodes'"),
        ("time: 24:00:00", "in quotes"),
        ("options: [mem=0]", "is no option of sbatch"),
        ("signal: 0", "signal"),
        ("time: '3'", "leaves no time to train"),
    ],
)
def test_mistakes_in_a_clusters_file(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        cluster_of(str(file), {})


def test_the_command_line_wins_over_the_clusters_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {cluster.CLUSTERS / 'default.yaml'}\nnodes: 2\ntime: '1:00:00'\n")
    found = cluster_of(str(file), {"nodes": 3, "time": None})
    assert (found.nodes, found.time, found.signal) == (3, "1:00:00", 180)
    with pytest.raises(InputError, match=r"there is no .*defualt.yaml; did you mean 'default'"):
        cluster_of("defualt", {})


@pytest.mark.parametrize(
    "time,expected",
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-02:03", 93780), ("UNLIMITED", None)],
)
def test_times_as_sbatch_takes_them(time, expected):
    assert cluster.seconds(time) == expected


@pytest.mark.parametrize("path", sorted(cluster.CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_clusters_in_configs(path):
    assert cluster_of(path.stem, {}).world >= 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pipelines").glob("*.yaml")), ids=lambda path: path.stem)
def test_pipelines_in_configs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = check(pipeline.Pipeline, load(path))
    assert all(Path(step.recipe).is_file() for step in line.steps.values())


def test_a_sweep_is_every_combination():
    values = slurm.combinations(["optim.lr=1e-3,2e-3", "seed=0,1"])
    assert [slurm.name_of(each) for each in values] == [
        *("lr=1e-3-seed=0", "lr=1e-3-seed=1", "lr=2e-3-seed=0", "lr=2e-3-seed=1")
    ]
    with pytest.raises(InputError, match="KEY=A,B"):
        slurm.combinations(["seed"])


def test_tracking_is_laid_over_a_resolved_recipe():
    uri = "sqlite:///a=b.db"
    made = shown_under(RECIPE, ["tracking.parent=abc", f"tracking.uri={uri}"])
    assert made["tracking"] == {"enabled": False, "parent": "abc", "uri": uri} and "uri" not in RECIPE["tracking"]


# Pipelines ------------------------------------------------------------------------------------------------------------

LINE = """
name: line
out: {out}
steps:
  first: {{stage: pretrain, recipe: a.yaml}}
  second: {{stage: finetune, recipe: b.yaml, weights: first, set: [seed=4]}}
  student: {{stage: finetune, recipe: c.yaml, teacher: second}}
"""


class Fake:
    """A launcher under which runs end at once; those in `fails` with the code there."""

    def __init__(self, **fails: int):
        self.fails, self.ran = fails, list[list[str]]()

    def run(self, stage: str, arguments: Sequence[str], log: Path) -> int:
        given = dict(word.split("=", 1) for word in arguments[1:])
        self.ran.append([stage, *arguments])
        code = self.fails.get(given["name"], DONE)
        folder = Path(given["out"]) / given["name"]
        tracker = Tracker(Tracker.Config(enabled=False), folder, given["name"], {}, {}, active=True)
        tracker.close("FAILED" if code else "FINISHED")
        return code

    def stop(self) -> None: ...


@pytest.fixture
def line(tmp_path, monkeypatch) -> pipeline.Pipeline:
    monkeypatch.setattr("penstock.tracking.origin", dict)
    monkeypatch.setattr(pipeline, "SIGNALS", ())
    file = tmp_path / "line.yaml"
    file.write_text(LINE.format(out=tmp_path))
    return check(pipeline.Pipeline, load(file))


def test_a_pipeline_runs_in_order_from_what_was_exported_and_goes_on_where_it_was(line, tmp_path):
    recipes = dict.fromkeys(line.steps, RECIPE)
    broken, whole = Fake(second=3), Fake()
    assert pipeline.run_here(line, recipes, broken) == 1
    assert [words[1] for words in broken.ran] == ["a.yaml", "b.yaml"]
    assert read_run(tmp_path / "line").status == "FAILED"
    assert pipeline.run_here(line, recipes, whole) == DONE
    second, student = whole.ran
    assert {"seed=4", f"backbone.weights={tmp_path}/line/first/export", f"out={tmp_path}/line"} <= set(second)
    assert f"task.teacher={tmp_path}/line/second" in student
    assert read_run(tmp_path / "line").status == "FINISHED"
    parents = {word for words in (*broken.ran, *whole.ran) for word in words if word.startswith("tracking.parent=")}
    assert len(parents) == 1
    assert pipeline.run_here(line, recipes, again := Fake()) == DONE and again.ran == []


@pytest.mark.parametrize(
    "old,new,words",
    [
        ("weights: first", "weights: frist", "steps.second.weights: no step before this one is called 'frist'"),
        ("teacher: second", "teacher: student", "write one of first, second"),
        ("stage: pretrain", "stage: pretain", "stage"),
        ("recipe: a.yaml", "recipes: a.yaml", "recipe"),
    ],
)
def test_mistakes_in_a_pipeline(tmp_path, old, new, words):
    file = tmp_path / "line.yaml"
    file.write_text(LINE.format(out=tmp_path).replace(old, new))
    with pytest.raises(InputError, match=words):
        check(pipeline.Pipeline, load(file))


# Looking --------------------------------------------------------------------------------------------------------------


def test_status_tells_progress_speed_time_left_and_restarts(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.tracking.origin", dict)
    run = tmp_path / "series/run"
    for step in (10, 25):
        tracker = Tracker(Tracker.Config(enabled=False), run, "run", {"duration": "100 steps"}, {}, active=True)
        tracker.log(step, {"perf/images_per_second": 50.0, "progress/samples": step * 32.0})
        tracker.close("KILLED")
    waits = tmp_path / "waits/jobs/0001"
    waits.mkdir(parents=True)
    (waits / "job.json").write_text('{"job": "12", "after": []}')
    monkeypatch.setattr(look, "queued", lambda jobs: dict.fromkeys(jobs, "PENDING"))
    assert look.states_of([run, tmp_path / "waits"]) == {"12": "PENDING"}
    assert list(look.row(run, {}))[1:] == ["killed", "25", "25%", "50", "48 s", "1", ""]
    assert list(look.row(tmp_path / "waits", {"12": "PENDING"}))[1:] == ["queued", "", "", "", "", "", "12 pending"]
    assert list(look.row(run, {"12": "RUNNING"}))[1] == "killed"
    (run / "jobs").symlink_to(tmp_path / "waits/jobs")
    assert [list(look.row(run, {"12": state}))[1] for state in ("RUNNING", "PENDING")] == ["running", "queued"]
    assert set(look.runs_in(tmp_path)) == {tmp_path / "waits", run}
    with pytest.raises(InputError, match="is no run and holds none"):
        look.runs_in(tmp_path / "nothing")


def test_the_newest_log_of_a_rank(tmp_path):
    with pytest.raises(InputError, match="holds nothing yet"):
        look.newest_log(tmp_path, "*/*/rank-0.log")
    for start in ("0", "1"):
        (tmp_path / "logs/7" / start).mkdir(parents=True)
        (tmp_path / "logs/7" / start / "rank-0.log").write_text(start)
    assert look.newest_log(tmp_path, "*/*/rank-0.log").read_text() == "1"
    (tmp_path / "line/logs").mkdir(parents=True)
    (tmp_path / "line/logs/first.log").write_text("words")
    assert look.newest_log(tmp_path / "line/first", "*/*/rank-0.log").read_text() == "words"


def test_a_launchers_stop_file_stops_every_rank_and_stays(tmp_path, monkeypatch):
    file = tmp_path / "stop-this-start"
    monkeypatch.setenv("PENSTOCK_STOP_FILE", str(file))
    ranks = [Stop(tmp_path / "run"), Stop(tmp_path / "run")]
    assert LOOK_EVERY > 0 and not any(rank.asked() for rank in ranks)
    file.touch()
    for rank in ranks:
        rank._looked = 0.0
    assert all(rank.asked() for rank in ranks) and file.exists()
