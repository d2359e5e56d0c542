"""Recipes: merging, origins, and mistakes told all at once."""

import re
from pathlib import Path

import pytest
import yaml

from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.recipe import check, load, resolved, to_yaml
from penstock.stage import main
from pretrain.recipe import Pretrain
from tests.shards import write_set


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), [6]).root


@pytest.fixture
def good(tmp_path, packed) -> Path:
    return write(
        tmp_path / "good.yaml",
        f"""
        name: good
        duration: 10 epochs
        batch: 64
        data: {{train: {packed}, val: {packed}}}
        augment: {{name: crop_flip, size: 32}}
        backbone: {{name: vit_tiny_patch16_224, size: 32}}
        method: {{name: mae, mask_ratio: 0.6}}
        optim: {{lr: 1e-3}}
        """,
    )


def write(path: Path, text: str) -> Path:
    lines = text.strip("\n").split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line[indent:] for line in lines))
    return path


def pretrain(*argv: str | Path) -> int:
    def never(recipe: Pretrain) -> int:
        raise AssertionError("a run was started")

    return main("pretrain", Pretrain, never, [str(word) for word in argv])


# Loading -----------------------------------------------------------------------------------------


def test_later_files_win_and_lists_are_replaced(tmp_path):
    write(tmp_path / "parts/a.yaml", "x: {one: 1, two: 1, list: [1, 2, 3]}\ny: from a")
    write(tmp_path / "parts/b.yaml", "extends: a.yaml\nx: {two: 2}")
    write(tmp_path / "parts/c.yaml", "x: {three: 3}\ny: from c")
    top = write(tmp_path / "top.yaml", "extends: [parts/b.yaml, parts/c.yaml]\nx: {list: [9]}\nz: null")
    source = load(top, ["x.three=33", "new.key=[a, b]"])
    assert source.values == {
        "x": {"one": 1, "two": 2, "three": 33, "list": [9]},
        "y": "from c",
        "z": None,
        "new": {"key": ["a", "b"]},
    }
    places = {key: source.origin(key).rpartition("/")[2] for key in ("x.one", "x.two", "x.three", "x.list", "y")}
    assert places == {
        "x.one": "a.yaml:1",
        "x.two": "b.yaml:2",
        "x.three": "command line",
        "x.list": "top.yaml:2",
        "y": "c.yaml:2",
    }


@pytest.mark.parametrize(
    "files,says",
    [
        ({"top": "extends: top.yaml"}, r"extends itself: top.yaml -> top.yaml"),
        ({"top": "extends: mid.yaml", "mid": "extends: top.yaml"}, r"top.yaml -> mid.yaml -> top.yaml"),
        (
            {"top": "extends: midd.yaml", "mid": "a: 1"},
            r"midd.yaml \(extended by .*top.yaml\); did you mean 'mid.yaml'",
        ),
        ({"top": "extends: 5"}, "extends is a file or a list of files, not 5"),
        ({"top": "extends: [{a: b}]"}, "extends is a file or a list of files"),
        ({"top": "a: 1\nb: 2\na: 3"}, r"top.yaml is not valid YAML: [\s\S]*duplicate key a[\s\S]*line 3"),
        ({"top": "a: [1"}, "not valid YAML"),
        ({"top": "- a\n- b"}, "must be a mapping"),
        ({"top": "just words"}, "must be a mapping|not valid"),
        ({"top": "a: ${nothing.here}"}, "nothing.here"),
        ({"top": "a: !!python/object/apply:os.getcwd []"}, "not valid YAML"),
    ],
)
def test_files_that_cannot_work(tmp_path, files, says):
    for name, text in files.items():
        write(tmp_path / f"{name}.yaml", text)
    with pytest.raises(InputError) as error:
        load(tmp_path / "top.yaml")
    assert re.search(says, str(error.value)), error.value


def test_a_missing_recipe_names_its_neighbour(tmp_path):
    write(tmp_path / "mae_vitb16.yaml", "a: 1")
    with pytest.raises(InputError, match=r"did you mean 'mae_vitb16\.yaml'"):
        load(tmp_path / "mae_vit_b16.yaml")


def test_an_empty_recipe_lacks_everything(tmp_path):
    with pytest.raises(InputError, match="duration: missing"):
        check(Pretrain, load(write(tmp_path / "empty.yaml", "# nothing")))


def test_a_new_name_starts_the_block_afresh_in_a_file(tmp_path):
    write(tmp_path / "base.yaml", "method: {name: mae, mask_ratio: 0.6}\noptim: {name: adamw, betas: [0.9, 0.95]}")
    top = write(
        tmp_path / "top.yaml", "extends: base.yaml\nmethod: {name: simclr, out: 64}\noptim: {name: adamw, lr: 1}"
    )
    source = load(top)
    assert source.values["method"] == {"name": "simclr", "out": 64}
    assert source.values["optim"] == {"name": "adamw", "betas": [0.9, 0.95], "lr": 1}
    assert source.origin("method.mask_ratio").endswith("top.yaml:2")  # nothing lingers of the old block


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=simclr", "method.temperature=0.2"],
        ["method.temperature=0.2", "method=simclr"],
        ["method.temperature=0.2", "method.name=simclr"],
        ["method={name: simclr, temperature: 0.2}"],
    ],
)
def test_a_new_name_starts_the_block_afresh_on_the_command_line(good, overrides):
    source = load(good, overrides)
    assert source.values["method"] == {"name": "simclr", "temperature": 0.2}
    assert {source.origin("method.temperature"), source.origin("method.name")} == {"command line"}


def test_the_same_name_keeps_the_block(good):
    assert load(good, ["method=mae"]).values["method"] == {"name": "mae", "mask_ratio": 0.6}


def test_values_as_people_write_them(good):
    source = load(good, ["optim.lr=2e-4", "evaluate=null", "batch=${seed}", "seed=32", "data.val=null"])
    assert source.values["optim"]["lr"] == 2e-4 and source.values["evaluate"] is None
    recipe = check(Pretrain, source)
    assert (recipe.batch, recipe.optim.lr, recipe.evaluate_blocks(), recipe.data.val) == (32, 2e-4, {}, None)
    assert check(Pretrain, load(good)).optim.lr == 1e-3  # YAML 1.1 reads 1e-3 as text


@pytest.mark.parametrize("override", ["batch", "=5", "batch=[1", "a..b=${"])
def test_overrides_that_cannot_work(good, override):
    with pytest.raises(InputError, match="command line"):
        load(good, [override])


def test_a_resolved_recipe_is_the_same_recipe_in_full(good, tmp_path):
    recipe = check(
        Pretrain,
        load(good, ["method.mask_ratio={name: wsd, start: 0.75, end: 0.5, decay: 20%}", "evaluate={knn: {k: 5}}"]),
    )
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe))
    assert resolved(check(Pretrain, load(again))) == resolved(recipe)
    assert yaml.safe_load(again.read_text())["optim"]["weight_decay"] == 0.05  # defaults are written, too


# Checking ----------------------------------------------------------------------------------------

MISTAKES = """
name: bad
duration: 10 weeks
batch: -4
sead: 3
data: {train: PACKED, chanels: 3, channels: 1}
augment: {name: crop_flipp, size: 32}
backbone:
  name: resnet50
  options: {img_size: 32}
method:
  name: mae
  mask_ratio: much
optim:
  name: lars
  lr: 0.1
  base_lr: 0.2
  schedule: {name: cosine, wramup: 5 epochs}
  weight_decay: {name: cosin}
engine: {zero: 1, compile: yes please}
evaluate:
  knm: {}
  knn: {k: many}
"""
FOUND = {
    "duration": ("'10 weeks' is not a duration", 2),
    "batch": ("greater than 0, not -4", 3),
    "sead": ("did you mean 'seed'", 4),
    "data.chanels": ("did you mean 'channels'", 5),
    "data.channels": ("1 here and 3 in backbone.channels", 5),
    "augment.name": ("did you mean 'crop_flip'", 6),
    "backbone.name": ("needs a timm VisionTransformer", 8),
    "backbone.options": ("'img_size' is set by backbone.size", 9),
    "method.mask_ratio": ("valid number", 12),
    "optim.lr": ("either lr", 15),
    "optim.name": ("lars needs whole parameters", 14),
    "optim.schedule.wramup": ("did you mean 'warmup'", 17),
    "optim.weight_decay.name": ("did you mean 'cosine'", 18),
    "engine.compile": ("valid boolean", 19),
    "evaluate.knm": ("did you mean 'knn'", 21),
    "evaluate.knn.k": ("valid integer", 22),
}


def complaints(path: Path, overrides: tuple[str, ...] = ()) -> dict[str, tuple[str, str]]:
    """Key to (text, place) of every line of the message."""
    with pytest.raises(InputError) as error:
        check(Pretrain, load(path, overrides))
    first, *lines = str(error.value).splitlines()
    assert f"has {len(lines)} mistake" in first
    found = {}
    for line in lines:
        match = re.fullmatch(r"  (\S+?): (.*?)(?: \[([^\[\]]*)\])?", line)
        assert match, line
        found[match[1]] = (match[2], match[3])
    return found


def test_every_mistake_is_told_at_once_with_key_place_and_nearest_name(tmp_path, packed):
    path = write(tmp_path / "bad.yaml", MISTAKES.replace("PACKED", str(packed)))
    found = complaints(path)
    missing = {"data.val"}  # what `evaluate` needs
    assert found.keys() == FOUND.keys() | missing
    for key, (words, line) in FOUND.items():
        text, place = found[key]
        assert words in text, (key, text)
        assert place.endswith(f"bad.yaml:{line}"), (key, place)


@pytest.mark.parametrize(
    "overrides,key,words",
    [
        (("engine.zero=1", "optim.name=lars"), "optim.name", "lars needs whole parameters"),
        (("method=simclr", "augment=simclr", "engine.accumulation=2"), "engine.accumulation", "shrink the batch"),
        (("method=simclr",), "augment.name", "set augment=simclr"),
        (("backbone.name=resnet50",), "backbone.name", "vit_small_patch16_224"),
        (("backbone.size=33",), "backbone.size", "[32, 32] would do"),
        (("engine.precision=bf16_pure",), "engine.precision", "use zero: 1"),
        (("engine.zero=3", "engine.compile=true"), "engine.compile", "use zero: 2"),
        (("data.train=/nowhere",), "data.train", "penstock shards pack"),
        (("optim.lr=null",), "optim.lr", "base_lr"),
        (("optim.schedule=linearr",), "optim.schedule", "block"),
        (("optim.schedule.name=linearr",), "optim.schedule.name", "'linear'"),
        (("optim.schedule.end=0.1",), "optim.schedule.name", "missing"),
        (("optim.betas=[0.9]",), "optim.betas", "too few"),
        (("backbone.name=vit_tny_patch16_224",), "backbone.name", "'vit_tiny_patch16_224'"),
        (("engine.deepspeed={zero_optimization: {stage: 2}}",), "engine.deepspeed", "engine.zero"),
        (("backbone=5",), "backbone", "block"),
        (("evaluate={knn: {}}", "data.val=null"), "data.val", "evaluate=null"),
        (("mask_ratio=0.5",), "mask_ratio", "did you mean method.mask_ratio"),
        (("duration=50%",), "duration", "steps, epochs or samples"),
        (("name=a/b",), "name", "folder"),
    ],
)
def test_each_mistake_alone(good, overrides, key, words):
    found = complaints(good, overrides)
    assert list(found) == [key], found
    text, place = found[key]
    assert words in text, text
    assert place == "command line" or place.startswith(str(good))


# The command line -----------------------------------------------------------------------------------


def test_check_says_good_or_what_is_wrong(good, capsys):
    assert pretrain(good, "--check", "batch=32") == DONE
    assert "good" in capsys.readouterr().out
    assert pretrain(good, "--check", "batsh=32") == INPUT_WRONG
    assert "batsh: unknown key; did you mean 'batch'? [command line]" in capsys.readouterr().err
    assert pretrain(good.with_name("other.yaml"), "--check") == INPUT_WRONG
    assert "no recipe at" in capsys.readouterr().err


def test_check_passes_without_the_data_and_says_so(good, capsys):
    assert pretrain(good, "--check", "data.train=/nowhere") == DONE
    assert "but data.train: there is no /nowhere here; pack it" in capsys.readouterr().out


def test_explain_tells_every_value_and_where_it_came_from(good, capsys):
    assert pretrain(good, "method=simclr", "augment=simclr", "augment.size=48", "--explain") == DONE
    rows = {words[0]: words for words in map(str.split, capsys.readouterr().out.splitlines()[1:])}
    recipe = check(Pretrain, load(good, ["method=simclr", "augment=simclr", "augment.size=48"]))
    assert {"optim.lr", "method.temperature", "engine.zero", "augment.size"} <= rows.keys()
    assert rows["method.name"][1:] == ["simclr", "command", "line"]
    assert rows["augment.size"][1:] == [str(recipe.augment.size), "command", "line"]
    assert rows["method.temperature"][1:] == ["0.1", "default"]
    assert rows["optim.lr"][1] == "0.001" and rows["optim.lr"][2].endswith("good.yaml:8")


def test_help_lists_what_can_be_set(good, capsys):
    assert pretrain("--help") == DONE
    text = capsys.readouterr().out
    assert all(word in text for word in ("--explain", "optim.layer_decay", "engine.zero", "required", "mae, simclr"))
    assert pretrain(good, "--help") == DONE
    text = capsys.readouterr().out
    assert "method.mask_ratio" in text and "[height, width]" in " ".join(text.split())
    assert pretrain() == INPUT_WRONG
