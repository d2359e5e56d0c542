"""What recipes name and is not on this machine: a small packed set, and a teacher of its classes."""

from pathlib import Path

import pytest

from tests.trees import class_tree, packed

CLASSES = ("class_0", "class_1", "class_2")


@pytest.fixture(scope="session")
def packed_set(tmp_path_factory) -> Path:
    """24 labelled images of 3 classes, packed from a class-folder tree; beside it lie `teacher_of` them."""
    folder = tmp_path_factory.mktemp("standin")
    packed(class_tree(folder / "images", classes=len(CLASSES), each=8), folder / "set")
    for channels in (1, 3):
        write_teacher(teacher_of(folder / "set", channels), channels)
    return folder / "set"


def teacher_of(packed_set: Path, channels: int) -> Path:
    """A classifier of the packed set's classes, for images of so many channels."""
    return packed_set.with_name(f"teacher{channels}")


def write_teacher(folder: Path, channels: int) -> None:
    from penstock.backbones import Backbone
    from penstock.export import export_classifier
    from penstock.head import Head

    backbone = Backbone(Backbone.Config(name="test_resnet", size=64, channels=channels, mean=(0.5,), std=(0.5,)))
    head = Head(Head.Config(), backbone.dim, len(CLASSES), backbone)
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    export_classifier(state, backbone.config, head.config, folder, CLASSES)
