"""A cluster for all tests of this folder, packed digits, and one tiny run that nothing interrupted."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.runner import RECIPE
from tests.slurm.cluster import ROOT, Cluster, missing

FOLDER = Path(__file__).parent
SAMPLES = 200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4) as started:
        yield started


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for part, split in (("train", "train"), ("test", "val")):
        pack = ["-m", "penstock.cli", "shards", "pack", f"digits:{part}", str(folder / split)]
        limits = ["--limit", str(SAMPLES), "--samples-per-shard", "64"]
        subprocess.run([sys.executable, *pack, *limits], check=True, capture_output=True, cwd=ROOT)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(digits=folder))
    return path
