import argparse
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from penstock import compare
from penstock.errors import InputError
from penstock.tracking import Tracker
from penstock.tracking.commands import add_commands

NOWHERE = "sqlite:////nowhere/mlflow.db"


def make(folder: Path, params: dict, final: float | None, steps: int = 40, name: str | None = None) -> str:
    run = Tracker(Tracker.Config(enabled=False), folder, name or folder.name, params, {}, True)
    for step in range(10, steps + 1, 10):
        run.log(step, {"train/loss": 1 / step, "progress/samples": step * 8, "perf/images_per_second": 100.0 + step})
    run.log(steps, {"eval/knn_top1": 0.5} | ({"final/knn_top1": final} if final is not None else {}))
    run.close("FINISHED")
    return str(folder)


@pytest.fixture
def three(tmp_path) -> list[str]:
    base = {"optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "method": {"name": "mae"}}
    return [
        make(tmp_path / "a", base, 0.75),
        make(tmp_path / "b", {**base, "optim": {"lr": 0.2, "betas": [0.9, 0.95]}}, 0.25),
        make(tmp_path / "c", {**base, "method": {"name": "simclr", "[bold]": "[red]hot"}}, math.nan, steps=80),
    ]


def shown(runs: list, *patterns: str) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(compare.table(runs, patterns))
    return console.file.getvalue()


def test_results_and_differences(three):
    runs = compare.load(three, NOWHERE)
    reached = compare.results(runs)
    assert list(reached) == ["final/knn_top1"]
    assert reached["final/knn_top1"][:2] == [0.75, 0.25]
    assert compare.differences(runs) == {
        "optim.lr": ["0.1", "0.2", "0.1"],
        "method.name": ["mae", "mae", "simclr"],
        "method.[bold]": [None, None, "[red]hot"],
    }
    assert compare.differences(runs[:1]) == {}
    assert compare.results(runs, ["perf/*"])["perf/images_per_second"] == [140.0, 140.0, 180.0]


def test_a_run_without_results_shows_its_last_evaluation(tmp_path):
    runs = compare.load([make(tmp_path / "a", {}, None)], NOWHERE)
    assert compare.results(runs) == {"eval/knn_top1": [0.5], "train/loss": [1 / 40]}


def test_the_table(three):
    text = shown(compare.load(three, NOWHERE))
    row = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert row["final/knn_top1"] == ["0.75", "0.25", "nan"]
    assert row["method.[bold]"] == ["-", "-", "[red]hot"]
    assert row["steps"] == ["40", "40", "80"]
    assert row["images/s"] == ["130", "130", "150"]
    assert "optim.betas" not in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [make(tmp_path / each, {}, 0.5, name="same") for each in "ab"]
    assert [run.name for run in compare.load(paths, NOWHERE)] == paths


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(list(words))
    return args.run(args)


def test_json_is_strict_json(three, capsys):
    assert command("compare", *three, "--format", "json", "--metrics", "train/*") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found["differences"] == ["method.[bold]", "method.name", "optim.lr"]
    assert found["runs"][2]["results"] == {"final/knn_top1": "nan", "train/loss": 1 / 80}
    assert found["runs"][1]["recipe"] == {"method.[bold]": None, "method.name": "mae", "optim.lr": "0.2"}


def test_the_picture(three, tmp_path):
    from PIL import Image

    assert command("compare", *three, "--picture", str(tmp_path / "out.png")) == 0
    assert Image.open(tmp_path / "out.png").size[0] > 300
    with pytest.raises(InputError, match="no curve"):
        command("compare", *three, "--picture", str(tmp_path / "out.png"), "--metrics", "nothing/*")


def test_curves_are_drawn_over_samples_seen(three):
    run = compare.load(three[:1], NOWHERE)[0]
    assert compare.samples_at(run, [5, 10, 25, 40]) == [40.0, 80.0, 200.0, 320.0]


def test_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        compare.load([str(tmp_path)], NOWHERE)
    with pytest.raises(InputError, match="no MLflow store"):
        compare.load(["nothing"], NOWHERE)
