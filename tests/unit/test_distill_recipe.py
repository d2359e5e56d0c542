"""What a recipe says of distillation: nested losses, shown, corrected and switched off; a teacher that is absent."""

from pathlib import Path

import pytest

from finetune.recipe import Finetune
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.recipe import check, load
from penstock.stage import inputs_are_here, main
from tests.shards import write_set

LOSSES = "{soft_targets: {temperature: 2.0}, decoupled: {beta: 0.5}}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    packed = write_set(folder / "set", [6]).root
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: student\nduration: 1 epochs\nbatch: 4\ndata: {{train: {packed}, val: {packed}}}\n"
        "augment: {name: standard, size: 32}\nbackbone: {name: test_resnet, size: 32}\noptim: {lr: 1e-3}\n"
        f"task:\n  name: distill\n  teacher: runs/nobody\n  losses: {LOSSES}\n"
    )
    return path


def finetune(*argv: str | Path) -> int:
    def never(recipe: Finetune, find_lr: bool) -> int:
        raise AssertionError("a run was started")

    return main("finetune", Finetune, never, [str(word) for word in argv])


def keys(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith(" ")]


def checked(path: Path, *overrides: str) -> Finetune:
    return check(Finetune, load(path, overrides), without=(inputs_are_here,))


def test_explain_tells_where_every_number_of_a_loss_came_from(recipe, capsys):
    assert finetune(recipe, "--explain", "task.losses.soft_targets.temperature=3", "task.losses.dist={}") == DONE
    rows = {words[0]: words[1:] for words in map(str.split, capsys.readouterr().out.splitlines())}
    assert rows["task.losses.soft_targets.temperature"][1:] == ["command", "line"]
    assert rows["task.losses.decoupled.beta"] == ["0.5", f"{recipe}:11"]
    assert rows["task.losses.decoupled.alpha"] == ["1.0", "default"]
    assert rows["task.losses.dist.inter"] == ["2.0", "default"]


def test_help_shows_the_keys_of_the_losses_that_are_on_and_the_names_of_the_others(recipe, capsys):
    assert finetune(recipe, "--help") == DONE
    text = capsys.readouterr().out
    shown = keys(text)
    assert {"task.teacher", "task.losses.decoupled.beta", "task.losses.soft_targets.standardize"} <= set(shown)
    assert not any(key.startswith("task.losses.dist.") for key in shown)
    words = " ".join(text.split())
    assert "one of: attention, binary_targets, decoupled, dist" in words and "one of: classify, distill" in words
    assert len(shown) == len(set(shown))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "task.losses.decoupled.temprature=4",
            r"task.losses.decoupled.temprature: unknown key; did you mean .*temperat",
        ),
        (
            "task.losses.decoupld.beta=4",
            r"task.losses.decoupld: no losses is called 'decoupld'; did you mean 'decoupled'",
        ),
        ("task.losses.dkd={}", r"task.losses.dkd: no losses is called 'dkd'; one of: attention"),
        ("task.losses.decoupled.temperature=0", r"task.losses.decoupled.temperature: a temperature must be above 0"),
        ("task.losses.decoupled.beta=[1]", r"task.losses.decoupled.beta"),
        ("task.losses.decoupled=3", r"task.losses.decoupled: must be a block of keys and values"),
        ("task.temperature=3", r"task.temperature: unknown key; did you mean task.losses.\w+.temperature"),
        (
            "task.teacher=timm:regnety_16o.deit_in1k",
            r"task.teacher: no timm model is called 'regnety_16o'; .*'regnety_160'",
        ),
    ],
)
def test_a_mistake_within_a_loss_is_told_with_its_place(recipe, override, says):
    with pytest.raises(InputError, match=rf"has 1 mistake:\n  {says}.*\[command line\]"):
        checked(recipe, override)


def test_a_mistake_in_the_file_is_told_with_its_line(recipe, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(recipe.read_text().replace("beta:", "betta:"))
    with pytest.raises(
        InputError, match=r"task.losses.decoupled.betta: unknown key; did you mean 'beta'.*wrong.yaml:11\]"
    ):
        checked(wrong)


def test_a_loss_is_switched_off(recipe):
    assert set(checked(recipe).task.blocks()) == {"soft_targets", "decoupled"}
    assert set(checked(recipe, "task.losses.soft_targets=null").task.blocks()) == {"decoupled"}
    alone = checked(recipe, "task.losses.soft_targets=null", "task.losses.decoupled=null", "task.losses.dist.inter=3")
    assert {name: block.inter for name, block in alone.task.blocks().items()} == {"dist": 3}
    off = ("task.losses.soft_targets=null", "task.losses.decoupled=null")
    assert not checked(recipe, *off).task.blocks()
    with pytest.raises(InputError, match=r"task.losses: there is nothing to learn from"):
        checked(recipe, *off, "task.labels=0")
    assert set(checked(recipe, "task.losses=null").task.blocks()) == set()


def test_an_absent_teacher_stops_a_run_and_no_check(recipe, capsys):
    assert finetune(recipe, "--check") == DONE
    said = capsys.readouterr().out
    assert "good" in said and "but task.teacher: there is no 'runs/nobody' here; give a finetuned run" in said
    assert finetune(recipe) == INPUT_WRONG
    assert "task.teacher: there is no 'runs/nobody' here" in capsys.readouterr().err
    assert finetune(recipe, "--check", "task.teacher=timm:resnet34.tv_in1k") == DONE
    assert "but" not in capsys.readouterr().out
