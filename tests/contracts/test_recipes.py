"""What every recipe in `configs/` promises; a new file is tested the moment it exists.

A file without `name` is a part, which other recipes extend. Recipes of each stage are tried on a small stand-in for
their data, with a network of one block, for two steps on two ranks.
"""

import re
from pathlib import Path

import pytest
import yaml

from penstock.backbones import names
from penstock.errors import DONE
from penstock.recipe import check, load, resolved, to_yaml
from penstock.stage import main
from pretrain.recipe import Pretrain

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").glob("**/*.yaml"))
COMMAND = re.compile(r"^# Run: (?:make demo$|.*\bpretrain (?P<path>configs/\S+))")


def is_part(path: Path) -> bool:
    return "name" not in yaml.safe_load(path.read_text(encoding="utf-8"))


RECIPES = [path for path in FILES if not is_part(path)]


@pytest.fixture(params=RECIPES, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def path(request) -> Path:
    return request.param


def here(packed_set: Path) -> list[str]:
    return [f"data.train={packed_set}", f"data.val={packed_set}"]


def test_every_part_is_extended_by_some_recipe():
    extended = set()
    for path in FILES:
        parents = yaml.safe_load(path.read_text(encoding="utf-8")).get("extends", [])
        for parent in [parents] if isinstance(parents, str) else parents:
            extended.add((path.parent / parent).resolve())
    assert {path for path in FILES if is_part(path)} <= extended


def test_header_gives_the_command(path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    found = [match for match in map(COMMAND.match, header) if match]
    assert len(found) == 1, "the header holds one line `# Run: python -m launch local pretrain configs/...`"
    assert found[0]["path"] in (None, path.relative_to(ROOT).as_posix())


def test_no_path_of_someones_machine(path):
    assert not re.search(r"(?m)^[^#]*:\s*[\"']?(/|~)", path.read_text(encoding="utf-8"))


def test_check_says_good(path, packed_set, capsys):
    assert main("pretrain", Pretrain, lambda recipe: 1, [str(path), "--check", *here(packed_set)]) == DONE
    assert "good" in capsys.readouterr().out


def test_the_resolved_recipe_is_the_same_recipe(path, packed_set, tmp_path):
    recipe = check(Pretrain, load(path, here(packed_set)))
    again = tmp_path / "resolved.yaml"
    again.write_text(to_yaml(recipe))
    assert resolved(check(Pretrain, load(again))) == resolved(recipe)


def smaller(path: Path, packed_set: Path, out: Path) -> list[str]:
    """Overrides that make the recipe two steps of a small network, on the stand-in set; its combinations stay."""
    recipe = check(Pretrain, load(path, here(packed_set)))
    overrides = [*here(packed_set), f"out={out}", "duration=2 steps", "tracking.enabled=false", "data.workers=0"]
    overrides += [f"batch={4 * recipe.engine.accumulation}", "engine.compile=false"]  # compiling needs a compiler
    overrides += ["monitor.at_start=false", "monitor.batch=6"]
    if names.is_vit(recipe.backbone.name):
        overrides += [f"backbone.options.{option}" for option in ("depth=1", "embed_dim=96", "num_heads=3")]
    else:
        overrides += ["augment.size=64", "backbone.size=64"]
    return overrides + ["method.decoder_depth=1"] * (recipe.method.name == "mae")


def run_two_steps(rank: int, world: int, overrides: list[str], path: str) -> tuple[int, list[str]]:
    from pretrain.run import start

    recipe = check(Pretrain, load(path, overrides))
    code = start(recipe)
    return code, sorted(file.name for file in recipe.folder.iterdir())


def test_two_steps(path, packed_set, tmp_path, ranks):
    (code, files), (other, _) = ranks(2).run(run_two_steps, smaller(path, packed_set, tmp_path), str(path))
    assert code == other == DONE
    assert {"recipe.yaml", "journal.jsonl", "checkpoints", "export"} <= set(files)
