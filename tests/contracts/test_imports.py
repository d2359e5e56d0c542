"""The import rules of the architecture, by reading the source: who may know whom.

Each rule is also broken once on purpose, in a tree of one file, to see that it is noticed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("penstock", "pretrain", "finetune", "launch")

# What may import a library, as the beginning of a file's path.
ONLY = {
    "deepspeed": "penstock/engine",
    "mlflow": "penstock/tracking/mirror.py",
    "webdataset": "penstock/streams/",
    "obstore": "penstock/streams/sets/remote/store.py",  # whose process nobody forks
    "onnx": "penstock/formats/",
    "onnxscript": "penstock/formats/",
    "onnxruntime": "penstock/formats/",
    "penstock.trainer": "penstock/assembly.py",  # below the trainer, nothing knows it
}
# What a part may not import.
NEVER = {
    "penstock/": ("pretrain", "finetune", "launch", "penstock.assembly"),  # only the stages put a run together
    "pretrain/": ("finetune", "launch"),
    "finetune/": ("pretrain", "launch"),
    "launch/": ("torch", "torchvision", "timm"),
}
# Of our own packages, all that a part may import.
KNOWS = {
    "launch/": (
        *("launch", "penstock.recipe", "penstock.errors", "penstock.progress", "penstock.registry"),
        *("penstock.schedule", "penstock.tracking", "penstock.compare", "penstock.paired"),
    ),
    "penstock/trainer.py": (
        *("penstock.engine", "penstock.checkpoint", "penstock.tracking", "penstock.task", "penstock.streams"),
        *("penstock.distributed", "penstock.keyed", "penstock.schedule", "penstock.signals", "penstock.errors"),
        *("penstock.meters", "penstock.progress", "penstock.ema"),
    ),
}
TOP_LEVEL = {
    *("penstock", "pretrain", "finetune", "launch", "configs", "slurm", "tests"),
    *("pyproject.toml", "requirements.txt", "requirements-dev.txt", "README.md", "Makefile", "LICENSE", "CHANGELOG.md"),
    *(".ci", ".gitignore", ".pre-commit-config.yaml"),
}
NAMES_A_PACKAGE = {"import_module", "__import__", "Registry", "one_of", "several_of"}  # calls given a module's name


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything a file imports, inside functions too; names may be attributes of the module."""
    package = list(file.relative_to(root).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in NAMES_A_PACKAGE and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def reasons(path: str, module: str) -> Iterator[str]:
    """Why the file at `path` may not import `module`."""
    for name, home in ONLY.items():
        if within(module, (name,)) and not path.startswith(home):
            yield f"only {home} may"
    for part, names in NEVER.items():
        if path.startswith(part) and within(module, names):
            yield f"{part} may not"
    for part, names in KNOWS.items():
        if path.startswith(part) and within(module, PACKAGES) and not within(module, names):
            yield f"of our own packages, {part} may import {', '.join(names)} alone"


def violations(root: Path) -> list[str]:
    found = []
    for file in sorted(file for package in PACKAGES for file in root.glob(f"{package}/**/*.py")):
        path = file.relative_to(root).as_posix()
        for line, module in imports(file, root):
            found += [f"{path}:{line} imports {module}: {why}" for why in reasons(path, module)]
    return found


def test_imports_point_one_way():
    assert not violations(ROOT)


@pytest.mark.parametrize(
    "path,source",
    [
        ("penstock/optim.py", "import deepspeed"),
        ("penstock/stage.py", "def f():\n    from deepspeed.runtime import zero"),
        ("penstock/compare.py", "import mlflow.tracking"),
        ("penstock/tracking/mirrored.py", "from mlflow import MlflowClient"),
        ("pretrain/run.py", "import webdataset as wds"),
        ("penstock/export.py", "def f():\n    import onnx"),
        ("finetune/run.py", "from onnxruntime.quantization import quantize_static"),
        ("penstock/streams.py", "import webdataset"),
        ("penstock/streams/reader.py", "def f():\n    from obstore.store import S3Store"),
        ("penstock/stage.py", "from pretrain import recipe"),
        ("penstock/stage.py", "import importlib\nimportlib.import_module('pretrain.methods.mae')"),
        ("penstock/evaluate/knn.py", "METHODS = Registry('pretrain.methods')"),
        ("penstock/monitor.py", "from .trainer import Run"),
        ("penstock/evaluate/knn.py", "from ..trainer import Run"),
        ("penstock/evaluate/knn.py", "from .. import trainer"),
        ("penstock/trainer.py", "from penstock.backbones import Backbone"),
        ("penstock/trainer.py", "from penstock import monitor"),
        ("pretrain/methods/mae.py", "from finetune.losses import kd"),
        ("finetune/run.py", "import pretrain.run"),
        ("finetune/run.py", "from launch.local import gpus"),
        ("launch/local.py", "import torch"),
        ("launch/local.py", "from penstock.engine import Engine"),
        ("launch/local.py", "from penstock import distributed"),
        ("launch/slurm.py", "import pretrain.recipe"),
    ],
)
def test_each_rule_is_noticed_when_broken(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert len(violations(tmp_path)) == 1, violations(tmp_path)


@pytest.mark.parametrize(
    "path,source",
    [
        ("penstock/engine_state.py", "import deepspeed"),
        ("penstock/tracking/mirror.py", "import mlflow"),
        ("penstock/streams/sets/pack.py", "import webdataset"),
        ("penstock/formats/int8.py", "import onnx, onnxruntime"),
        ("pretrain/run.py", "from penstock.assembly import run"),
        ("launch/local.py", "from penstock.recipe import load\nfrom launch import demo\nimport rich"),
    ],
)
def test_what_the_rules_allow(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert not violations(tmp_path)


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` are loaded in a fresh process that runs `code`."""
    script = f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2].split()


HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "mlflow",
    "sklearn",
    "matplotlib",
    "pandas",
    "webdataset",
    "onnx",
    "onnxruntime",
)


@pytest.mark.parametrize(
    "code",
    [
        "import launch.__main__, launch.local, launch.series, launch.distill, launch.ablate.report",
        "import penstock.recipe, penstock.errors, penstock.progress, penstock.registry",
        "import penstock.cli",
    ],
)
def test_light_parts_load_nothing_heavy(code):
    assert loaded_by(code, HEAVY) == []


def test_a_recipe_is_checked_without_the_heavy_libraries(packed_set):
    """torch alone is loaded: options of components sit beside their code."""
    recipe = ROOT / "configs/cifar10/mae_vit_tiny.yaml"
    overrides = [f"data.train={packed_set}", f"data.val={packed_set}"]
    code = (
        "from penstock.stage import main; from pretrain.recipe import Pretrain\n"
        f"assert main('pretrain', Pretrain, None, [{str(recipe)!r}, '--check', *{overrides!r}]) == 0"
    )
    assert loaded_by(code, HEAVY) == ["torch"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_top_level_holds_what_the_architecture_says():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {path.split("/")[0] for path in listed.splitlines()} <= TOP_LEVEL
