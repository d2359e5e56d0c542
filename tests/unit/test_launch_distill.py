"""`launch distill`: which runs it makes of a recipe, and what it makes of their report."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from launch import distill
from launch.series import Series, Trial
from penstock.errors import InputError

BASE = {
    "name": "student",
    "out": "runs",
    "seed": 3,
    "data": {"val": "data/val"},
    "task": {
        "name": "distill",
        "teacher": "runs/t",
        "cache": "answers",
        "losses": {"soft_targets": {"temperature": 2.0}, "dist": None},
    },
}


def planned(monkeypatch, overrides: list[str], base: dict[str, Any] = BASE, **given: Any) -> distill.Students:
    monkeypatch.setattr(distill, "resolve", lambda recipe, variants: [base for _ in variants])
    args = Namespace(**{"recipe": "r.yaml", "losses": None, "online": False, "seeds": 1, **given})
    return distill.planned(args, overrides)[0]


def test_the_student_alone_keeps_all_but_the_teacher(monkeypatch):
    plan = planned(monkeypatch, ["duration=2 epochs", "task.cache=answers", "task.losses.dist={}"], seeds=2)
    assert plan.overrides_of("distilled") == ["duration=2 epochs", "task.cache=answers", "task.losses.dist={}"]
    assert plan.overrides_of("alone") == ["duration=2 epochs", "task=classify"]
    assert plan.trials() == [Trial(variant, seed) for seed in (3, 4) for variant in ("distilled", "alone")]


def test_each_loss_by_itself(monkeypatch):
    plan = planned(monkeypatch, ["task.losses.soft_targets.temperature=4"], losses="decoupled,soft_targets")
    assert plan.overrides_of("decoupled") == [
        "task.losses.soft_targets=null",
        "task.losses.dist=null",
        "task.losses.decoupled={}",
    ]
    assert plan.overrides_of("soft_targets") == ["task.losses.soft_targets.temperature=4", "task.losses.dist=null"]


def test_online_beside_a_cache(monkeypatch):
    plan = planned(monkeypatch, ["task.cache=answers"], online=True)
    assert plan.overrides_of("online") == ["task.cache=null"]
    without = {**BASE, "task": {**BASE["task"], "cache": None}}
    with pytest.raises(InputError, match="online as it is"):
        planned(monkeypatch, [], without, online=True)


def test_a_recipe_that_does_not_distill_is_refused(monkeypatch):
    with pytest.raises(InputError, match="distills nothing"):
        planned(monkeypatch, [], {**BASE, "task": {"name": "classify"}})


def test_the_report_is_of_the_runs_that_have_finished(monkeypatch, tmp_path, capsys):
    plan = planned(monkeypatch, [], seeds=2)
    called: list[list[str]] = []
    done = {"distilled-seed3", "alone-seed3", "distilled-seed4"}
    monkeypatch.setattr(distill, "finished", lambda folder: folder.name in done)
    monkeypatch.setattr(distill.subprocess, "run", lambda words: called.append(words) or Namespace(returncode=0))
    assert distill.report(Series(plan, Path("f"), {}), BASE, ["old=runs/old"]) == 0
    words = called[0][called[0].index("students") :]
    assert words[:5] == [
        "students",
        "runs/t",
        "distilled=f/distilled-seed3,f/distilled-seed4",
        "alone=f/alone-seed3",
        "old=runs/old",
    ]
    assert words[words.index("--data") + 1] == "data/val" and "--out" not in words
    done.clear()
    assert distill.report(Series(plan, Path("f"), {}), BASE, []) == 0 and len(called) == 1
    assert "no run has finished yet" in capsys.readouterr().out


def test_figures_and_files_go_to_the_parent_run(tmp_path):
    latency = {"1": {"median": 2.0, "low": 1.0}}
    row = {
        "name": "alone",
        "figures": {"top1": 71},
        "cost": {"parameters": 5, "macs": 6, "bytes": 7, "latency_ms": latency},
    }
    gain = {"distilled": "d", "alone": "alone", "effects": {"top1": {"value": 2, "low": 1, "high": 3, "seeds": 3}}}
    made = {"teacher": {**row, "name": "t"}, "students": [row], "gains": [gain]}
    (tmp_path / "report.json").write_text(json.dumps(made))
    kept: dict[str, tuple[int, float]] = {}
    files: list[str] = []
    tracker = Namespace(
        log=lambda step, metrics: kept.update({name: (step, value) for name, value in metrics.items()}),
        journal=Namespace(attempts=[1, 2]),
        artifact=lambda path: files.append(Path(path).name),
    )
    distill.keep(tmp_path, tracker)
    assert files == ["report.json", "report.md", "students.png"]
    assert kept["alone/top1"] == (2, 71) and kept["t/latency_ms_1"] == (2, 2) and kept["gain/d/top1_low"] == (2, 1)
