"""`python -m finetune` on two ranks with different images, and with accumulation, against a plain loop of timm's pieces
in one process with the whole batch. Batch norm goes without accumulation, which would make its batch smaller."""

from pathlib import Path

import pytest

from tests.numerics import plain

RUNS = [  # case, ranks, micro-batches of a step
    ("resnet50", 2, 1),
    ("resnet50 with an average", 2, 1),
    ("vit_small", 1, 4),
    ("vit_small", 2, 2),
    ("vit_small with an average, clipped", 2, 1),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The plain loop's outcome of a case, computed once, with the folder of its set and the weights it began with."""
    folder, known = plain.make_set(tmp_path_factory.mktemp("parity")), {}

    def of(name: str):
        if name not in known:
            known[name] = plain.plain(folder, plain.CASES[name])
        return folder, *known[name]

    return of


@pytest.mark.parametrize(("name", "world", "accumulation"), RUNS)
def test_ranks_and_accumulation_change_nothing(reference, tmp_path: Path, ranks, name, world, accumulation):
    folder, theirs, begin = reference(name)
    case = plain.CASES[name]
    overrides = (*case.overrides, f"engine.accumulation={accumulation}")
    assert ranks(world).run(plain.run, folder, tmp_path, overrides) == [0] * world
    plain.compare(plain.outcome(tmp_path), theirs, begin)


def test_unsynchronised_statistics_are_seen(reference, tmp_path, ranks):
    """Each rank's own batch norm is another function of the batch; the comparison would notice."""
    folder, theirs, begin = reference("resnet50")
    overrides = (*plain.CASES["resnet50"].overrides, "batchnorm.mode=local")
    ranks(2).run(plain.run, folder, tmp_path, overrides)
    with pytest.raises(AssertionError, match=r"apart|losses"):
        plain.compare(plain.outcome(tmp_path), theirs, begin)
