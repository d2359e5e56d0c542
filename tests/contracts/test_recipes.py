"""What every recipe in `configs/` promises; a new file is tested the moment it exists.

A file without `name` is a part, which other recipes extend. The stage of the others is told by the command in their
header. Each is tried on a small stand-in for its data, with a network of a few blocks, for two steps on two ranks.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.recipe import Finetune
from penstock.backbones import names
from penstock.errors import DONE, INPUT_WRONG
from penstock.recipe import check, load, resolved, to_yaml
from penstock.schedule import Clock, value_at
from penstock.stage import Recipe, main
from pretrain.recipe import Pretrain
from tests.contracts.conftest import teacher_of

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("launch", "pipelines")  # no recipes; tests/unit/test_launch_slurm.py reads them
FILES = sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if path.parent.name not in OTHERS)
COMMAND = re.compile(
    r"^# Run: (?:make demo$|.*\b(?P<stage>pretrain|finetune|distill)(?: --\w+ \S+)* (?P<path>configs/\S+))"
)
STAGES: dict[str, type[Recipe]] = {"pretrain": Pretrain, "finetune": Finetune}
IMAGENET = 1_281_167  # training images
# Options that make a network of a family of timm's small; those that are not here take ResNets' `layers`.
SMALL = {
    "tiny_vit": ["depths=[1,1,1,1]", "embed_dims=[24,48,96,96]", "num_heads=[1,2,3,3]"],
    "mobilenetv3": [],
    "resnetv2": ["channels=[128,128,128,128]"],  # norms are of 32 groups
}


def is_part(path: Path) -> bool:
    return "name" not in yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(path: Path) -> list[re.Match]:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return [match for match in map(COMMAND.match, header) if match]


def stage_of(path: Path) -> str:
    """The stage in the header's command; `make demo` begins with pretraining, and `launch distill` finetunes."""
    found = next((match["stage"] for match in commands(path) if match["stage"]), "pretrain")
    return "finetune" if found == "distill" else found


RECIPES = [path for path in FILES if not is_part(path)]


@pytest.fixture(params=RECIPES, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def path(request) -> Path:
    return request.param


def here(path: Path, packed_set: Path) -> list[str]:
    """Overrides for what is not on this machine: data, teachers, and the weights of a run that comes before."""
    starts = ["backbone.weights=null", "head.init=random", "optim.l2_sp=0"] * (stage_of(path) == "finetune")
    values = load(path).values
    if values.get("task", {}).get("name") == "distill":
        starts += [f"task.teacher={teacher_of(packed_set, values['data'].get('channels', 3))}", "task.cache=null"]
    return [f"data.train={packed_set}", f"data.val={packed_set}", *starts]


def checked(path: Path, overrides: list[str]) -> Any:
    return check(STAGES[stage_of(path)], load(path, overrides))


def test_every_part_is_extended_by_some_recipe():
    extended = set()
    for path in FILES:
        parents = yaml.safe_load(path.read_text(encoding="utf-8")).get("extends", [])
        for parent in [parents] if isinstance(parents, str) else parents:
            extended.add((path.parent / parent).resolve())
    assert {path for path in FILES if is_part(path)} <= extended


def test_header_gives_the_command(path):
    found = commands(path)
    assert len(found) == 1, "the header holds one line `# Run: python -m launch local STAGE configs/...`"
    assert found[0]["path"] in (None, path.relative_to(ROOT).as_posix())


def test_header_says_what_to_expect(path):
    if path.parent.name == "demo":
        return  # `make demo` ends with its results
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header is not None and re.search(r"^# (Result|Expect)", header[0], re.MULTILINE)


def test_no_path_of_someones_machine(path):
    assert not re.search(r"(?m)^[^#]*:\s*[\"']?(/|~)", path.read_text(encoding="utf-8"))


def test_check_says_good(path, packed_set, capsys):
    stage = stage_of(path)
    overrides = here(path, packed_set)
    assert main(stage, STAGES[stage], lambda recipe, find_lr: 1, [str(path), "--check", *overrides]) == DONE
    assert "good" in capsys.readouterr().out


def test_explain_names_the_place_of_every_value(path, packed_set, capsys):
    stage = stage_of(path)
    overrides = here(path, packed_set)
    assert main(stage, STAGES[stage], lambda recipe, find_lr: 1, [str(path), "--explain", *overrides]) == DONE
    said = capsys.readouterr().out
    assert path.name in said and re.search(r"^duration .*\.yaml:\d+", said, re.MULTILINE)


def test_the_other_stage_refuses_it(path, packed_set, capsys):
    other = {"pretrain": "finetune", "finetune": "pretrain"}[stage_of(path)]
    overrides = here(path, packed_set)
    assert main(other, STAGES[other], lambda recipe, find_lr: 1, [str(path), "--check", *overrides]) == INPUT_WRONG


def test_the_resolved_recipe_is_the_same_recipe(path, packed_set, tmp_path):
    recipe = checked(path, here(path, packed_set))
    again = tmp_path / "resolved.yaml"
    again.write_text(to_yaml(recipe))
    assert resolved(check(type(recipe), load(again))) == resolved(recipe)


def test_a_size_that_changes_grows_and_lasts(path, packed_set):
    """Progressive resizing: sizes never fall, and the last one has an epoch at least."""
    recipe = checked(path, here(path, packed_set))
    if isinstance(recipe.augment.size, (int, float)):
        return
    clock = Clock.of(recipe.duration, recipe.batch, IMAGENET)
    sizes = [value_at(recipe.augment.size, step, clock) for step in range(clock.total)]
    assert len(set(sizes)) > 1 and all(after >= before for before, after in pairwise(sizes))
    assert (sizes.count(sizes[-1]) + 1) * clock.batch > clock.epoch  # to within a step


def smaller(path: Path, packed_set: Path, out: Path) -> list[str]:
    """Overrides that make the recipe two steps of a small network, on the stand-in set; its combinations stay."""
    recipe = checked(path, here(path, packed_set))
    overrides = [*here(path, packed_set), f"out={out}", "duration=2 steps", "tracking.enabled=false", "data.workers=0"]
    batch = 4 * recipe.engine.accumulation * (2 if recipe.batch_growth > 1 else 1)
    overrides += [f"batch={batch}", "data.labels=null", "engine.compile=false"]  # compiling needs a compiler
    overrides += ["monitor.at_start=false", "monitor.batch=6"]
    if recipe.average.name != "none":
        overrides += ["average.every=1", "average.start=1 steps"]
    facts = names.facts(recipe.backbone.name)
    if facts.kind.startswith("VisionTransformer"):
        small = ["depth=2", "embed_dim=96", "num_heads=3"]  # two blocks, as the first has no drop path
    else:
        small = SMALL.get(facts.family, ["layers=[1,1,1,1]"])
        overrides += ["backbone.size=64"] + ["monitor.size=64"] * (recipe.monitor.size is not None)
        overrides += sizes(recipe.augment.size)
    overrides += [f"backbone.options.{option}" for option in small]
    return overrides + ["method.decoder_depth=1"] * (stage_of(path) == "pretrain" and recipe.method.name == "mae")


def sizes(knob: Any) -> list[str]:
    """A size of 64 pixels; a curve in steps goes from there to 96 at the second step."""
    if isinstance(knob, (int, float)):
        return ["augment.size=64"]
    assert knob.name == "step", "say here how to make this curve small"
    return ["augment.size.start=64", "augment.size.values=[96]", "augment.size.milestones=[1 steps]"]


def run_two_steps(rank: int, world: int, overrides: list[str], path: str) -> tuple[int, list[str]]:
    from finetune.run import start as finetune
    from pretrain.run import start as pretrain

    recipe = checked(Path(path), overrides)
    code = (finetune if isinstance(recipe, Finetune) else pretrain)(recipe)
    return code, sorted(file.name for file in recipe.folder.iterdir())


def test_two_steps(path, packed_set, tmp_path, ranks):
    (code, files), (other, _) = ranks(2).run(run_two_steps, smaller(path, packed_set, tmp_path), str(path))
    assert code == other == DONE
    assert {"recipe.yaml", "journal.jsonl", "checkpoints", "export"} <= set(files)
