"""A packed set for recipes whose own data are not on this machine."""

from pathlib import Path

import pytest

from tests.trees import class_tree, packed


@pytest.fixture(scope="session")
def packed_set(tmp_path_factory) -> Path:
    """24 labelled images of 3 classes, packed from a class-folder tree."""
    folder = tmp_path_factory.mktemp("standin")
    packed(class_tree(folder / "images", classes=3, each=8), folder / "set")
    return folder / "set"
