"""`python -m finetune` in one process, against a plain PyTorch loop of timm's own pieces (two ranks: distributed/)."""

from pathlib import Path

import pytest

from tests.numerics import plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return plain.make_set(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", plain.CASES)
def test_a_run_equals_a_plain_loop(folder, tmp_path, ranks, name):
    case = plain.CASES[name]
    theirs, begin = plain.plain(folder, case)
    assert ranks(1).run(plain.run, folder, tmp_path, case.overrides) == [0]
    plain.compare(plain.outcome(tmp_path), theirs, begin)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("resnet50", "optim.weight_decay=0.011"),
        ("resnet50", "optim.lr=0.001001"),
        ("vit_small", "optim.layer_decay=0.701"),
    ],
)
def test_a_small_mistake_is_seen(folder, tmp_path, ranks, name, wrong):
    case = plain.CASES[name]
    theirs, begin = plain.plain(folder, case)
    ranks(1).run(plain.run, folder, tmp_path, (*case.overrides, wrong))
    with pytest.raises(AssertionError, match=r"apart|losses"):
        plain.compare(plain.outcome(tmp_path), theirs, begin)
