"""The user's own stages: what they hand over, and that they cannot break counts."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from penstock.augment.crop_flip import CropFlip
from penstock.augment.none import NoAugmentation
from penstock.errors import InputError
from penstock.monitor import Monitor, eval_stream
from penstock.schedule import Clock
from penstock.streams import stages
from penstock.streams.data import Data
from penstock.streams.evaluation import EvalStream
from penstock.streams.faults import FaultLog
from penstock.streams.images import Images
from penstock.streams.sets.manifest import Manifest
from penstock.streams.train import TrainStream
from tests.members import EXTRA, TOTAL, members_of, same, slots, stream, take, write_set

PLAIN = NoAugmentation(NoAugmentation.Config(size=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"))


def numbered(samples):
    """A stage that draws from all three generators, adds a tensor and an array, and changes views and label."""
    for sample in samples:
        drawn = torch.randint(256, (2,)), np.random.randint(256), __import__("random").randrange(256)
        sample["tokens"] = torch.tensor([int(sample["__key__"][1:]), len(sample.get("caption") or "")])
        sample["drawn"] = np.array([*drawn[0].tolist(), *drawn[1:]])
        sample["label"] = np.int64((sample["label"] + 1) % 7)
        sample["views"][0][:, 4:, 4:] = torch.randint(256, (3, 4, 4), dtype=torch.uint8)
        yield sample


def later(samples):
    for sample in samples:
        yield sample | {"again": int(torch.randint(1 << 30, ()))}


def test_stages_change_and_add(folder):
    batches = take(stream(folder, [numbered, later], extra={"caption": "txt"}), 8)
    found = slots(batches)
    for sample in found.values():
        number = sample["number"]
        assert sample["label"] == (number % 7 + 1) % 7
        assert sample["tokens"].tolist() == [number, len(members_of(number).get("caption", ""))]
    assert batches[0].extra["tokens"].shape == (8, 2) and isinstance(batches[0].members["drawn"][0], np.ndarray)
    draws = [tuple(sample["drawn"]) for sample in found.values()] + [sample["again"] for sample in found.values()]
    assert len(set(draws)) == len(draws)  # keyed by position, so a sample that comes again is drawn anew


@pytest.mark.parametrize("data", [{}, {"repeats": 2}, {"pool": 3}])
def test_promises_hold_whatever_the_ranks_and_workers(folder, data):
    """The same members, draws and pixels for 1 and 2 ranks, 0, 1 and 2 workers, and after a restart."""
    made = [numbered, later]
    augment = CropFlip(CropFlip.Config(size=8))
    options: dict[str, Any] = {"extra": EXTRA, "augment": augment} | data
    torch.manual_seed(1)
    state = torch.get_rng_state(), str(np.random.get_state())
    whole = slots(take(stream(folder, made, **options), 9))
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == str(np.random.get_state())
    for workers, world, since in ((1, 1, 0), (2, 1, 40), (0, 2, 8), (1, 4, 0)):
        found: dict[int, Any] = {}
        for rank in range(world):
            other = stream(folder, made, workers=workers, rank=rank, world=world, **options)
            found |= slots(take(other, 9 - since // 8, since))
        assert same(found, {position: sample for position, sample in whole.items() if position >= since})


def test_webdataset_stages_work_as_they_are(folder):
    import webdataset

    made = [
        webdataset.map(lambda sample: sample | {"words": sample["caption"] and sample["caption"].split()}),
        webdataset.map_dict(boxes=lambda value: len(value["boxes"])),
        webdataset.rename(count="boxes"),
        webdataset.shuffle(100),  # sees one sample at a time, so it does nothing
    ]
    batch = take(stream(folder, made, extra={"caption": "txt", "boxes": "json"}), 1)[0]
    for sample in slots([batch]).values():
        known = members_of(sample["number"])
        assert sample["words"] == (known["caption"].split() if "caption" in known else None)
        assert sample["count"] == len(known["boxes"]["boxes"])


def test_evaluation_hands_them_over_once_each(folder):
    images = Images(Manifest.load(folder))
    after = stages.After.of(images, PLAIN, {"vector": "npy"}, [numbered], seed=0)
    evaluation = EvalStream(images, PLAIN, batch=8, after=after)
    batches = list(evaluation)
    assert [int(batch.weights.sum()) for batch in batches] == [8, 8, 8, 5]
    real = [sample for position, sample in slots(batches).items() if position >= 0]
    assert [sample["number"] for sample in real] == list(range(TOTAL))
    assert all(same(sample["vector"], members_of(sample["number"])["vector"]) for sample in real)
    assert batches[-1].members["vector"][5:] == [None] * 3 and batches[-1].extra["tokens"][5:].tolist() == [[0, 0]] * 3


def dropping(samples):
    for sample in samples:
        if sample["__key__"] != "s007":
            yield sample


def doubling(samples):
    for sample in samples:
        yield sample
        yield dict(sample)


def endless(samples):
    sample = next(samples)
    while True:
        yield sample


def renaming(samples):
    for sample in samples:
        yield sample | {"__key__": "other"}


def tuples(samples):
    for sample in samples:
        yield sample["views"], sample["label"]


def raising(samples):
    for sample in samples:
        yield sample | {"word": sample["nothing"]}


def fewer_views(samples):
    for sample in samples:
        yield sample | {"views": []}


def floats(samples):
    for sample in samples:
        yield sample | {"views": [view.float() for view in sample["views"]]}


def soft(samples):
    for sample in samples:
        yield sample | {"label": 0.5}


def ragged(samples):
    for sample in samples:
        yield sample | {"box": torch.zeros(int(sample["__key__"][1:]) % 3)}


def sometimes(samples):
    for sample in samples:
        yield sample | ({"box": torch.zeros(2)} if int(sample["__key__"][1:]) % 2 else {})


def others(samples):
    for sample in samples:
        yield sample | ({} if int(sample["__key__"][1:]) % 2 else {"box": torch.zeros(2)})


def turning(samples):
    for sample in samples:
        number = int(sample["__key__"][1:])
        yield sample | {"box": number if number % 2 else torch.tensor(number)}


def no_iterator(samples):
    return 5


@pytest.mark.parametrize(
    "stage, said",
    [
        (dropping, r"dropping, at sample s007: it gave no sample back.*__drop__"),
        (doubling, r"doubling, at sample s\d+: it gave more than one sample back.*data\.repeats"),
        (endless, r"endless, at sample s\d+: it gave more than one"),
        (renaming, r"renaming, at sample s\d+: it gave back sample 'other'"),
        (tuples, r"tuples, at sample s\d+: it gave back a tuple"),
        (raising, r"raising, at sample s\d+: KeyError: 'nothing' \(.*test_stages\.py, line \d+\)"),
        (fewer_views, r"fewer_views.*`views` must stay a list of 1 uint8 tensors of shape \[\[3, 8, 8\]\]"),
        (floats, r"floats.*`views` must stay"),
        (soft, r"soft.*`label` must stay a class number"),
        (
            ragged,
            r"ragged, at sample s\d+: 'box' is a tensor float32 \[[12]\], but a tensor float32 \[0\] at s",
        ),
        (sometimes, r"sometimes, at sample s\d*[13579]: 'box' is a tensor float32 \[2\], but absent at sample s000"),
        (others, r"others, at sample s\d*[13579]: 'box' is absent, but a tensor float32 \[2\] at sample s000"),
        (turning, r"turning, at sample s\d*[13579]: 'box' is no tensor, but a tensor int64 \[\] at sample s000"),
        (no_iterator, r"no_iterator, at sample s\d+: TypeError"),
    ],
)
def test_stages_that_would_break_counts_are_named(folder, stage, said):
    for batch in (8, 1):  # what differs may lie in batches of its own
        with pytest.raises(InputError, match=said):
            take(stream(folder, [later, stage], batch=batch), TOTAL)


def test_a_worker_says_it_too(folder):
    """In the same words, without the worker's traceback."""
    others = set(multiprocessing.active_children())
    with pytest.raises(InputError, match=r"^data\.stages: dropping, at sample s007: it gave no sample back.*counted$"):
        take(stream(folder, [dropping], workers=1), 5)
    assert set(multiprocessing.active_children()) <= others  # it is gone without a garbage collection


def small_ones(samples):
    for sample in samples:
        if int(sample["__key__"][1:]) % 4 == 0:
            sample["__drop__"] = "too small"
        yield sample


def test_a_dropped_sample_is_a_counted_slot_of_weight_0(folder):
    batches = take(stream(folder, [small_ones, numbered], extra={"caption": "txt"}), 8)
    found = slots(batches)
    assert len(found) == 64
    for position, sample in found.items():
        gone = int(sample["key"][1:]) % 4 == 0
        assert sample["weight"] == (not gone)
        assert sample["views"][0].any() != gone
        if gone:
            assert sample["caption"] is None and sample["drawn"] is None and not sample["tokens"].any()
        fault = [fault for batch in batches for fault in batch.faults if fault["position"] == position]
        assert len(fault) == gone
        assert not gone or (fault[0]["kind"], fault[0]["reason"]) == ("dropped", "small_ones dropped it: too small")
    served = Counter(int(i) for batch in batches for i in batch.ids.tolist())  # type: ignore[union-attr]  # whoever proves epochs counts them as served
    assert len(served) == TOTAL


def test_drops_do_not_count_as_damage(folder, tmp_path):
    log = FaultLog(tmp_path, max_bad=0.0)
    for batch in take(stream(folder, [small_ones]), 8):
        log.add(batch)
    assert log.check() == 0
    lines = (tmp_path / "faults-rank-00000.jsonl").read_text().splitlines()
    assert len(lines) == log.dropped > 10 and json.loads(lines[0])["reason"] == "small_ones dropped it: too small"


def all_gone(samples):
    for sample in samples:
        yield sample | {"__drop__": "none is wanted"} if sample["label"] else sample


def test_a_batch_without_any_sample_has_its_tensors(tmp_path):
    """Of one slot each, so that most have nothing."""
    folder = write_set(tmp_path / "set", total=7)
    batches = take(stream(folder, [all_gone, numbered], batch=1, seed=3), 21)
    assert Counter(float(batch.weights) for batch in batches) == {0.0: 18, 1.0: 3}
    assert all(batch.extra["tokens"].shape == (1, 2) and "drawn" in batch.members for batch in batches)


def test_a_rank_of_padding_alone_has_all_names(folder):
    images = Images(Manifest.load(folder))
    after = stages.After.of(images, PLAIN, {"caption": "txt"}, [numbered], seed=0)
    ranks = [EvalStream(images, PLAIN, batch=4, world=2, rank=rank, limit=3, after=after) for rank in (0, 1)]
    one, other = (next(iter(rank)) for rank in ranks)
    assert (one.weights.sum(), other.weights.sum()) == (3, 0)
    assert one.extra["tokens"].shape == other.extra["tokens"].shape == (4, 2)
    assert one.members.keys() == other.members.keys() == {"caption", "drawn"}


def test_a_set_of_which_nothing_is_left_is_refused(folder):
    def unwanted(samples):
        for sample in samples:
            yield sample | {"__drop__": "unwanted"}

    with pytest.raises(InputError, match=r"^data\.stages: of 1,024 samples .* each was dropped"):
        take(stream(folder, [unwanted]), 1)


def test_tensors_may_follow_the_size_of_views(folder):
    def means(samples):
        for sample in samples:
            yield sample | {"mean": sample["views"][0].float().mean(0)}

    growing = CropFlip(CropFlip.Config.model_validate({"size": {"name": "linear", "start": 8, "end": 16}}))
    batches = take(stream(folder, [means], augment=growing), 100)
    assert {batch.extra["mean"].shape for batch in batches} == {(8, side, side) for side in range(8, 17)}


def test_tensors_of_any_type_come_from_workers(folder):
    def odd(samples):
        for sample in samples:
            grown = torch.ones(3, requires_grad=True) * 2
            yield sample | {"grown": grown, "tiny": torch.ones(2).to(torch.float8_e4m3fn)}

    (batch,) = take(stream(folder, [odd], workers=1), 1)
    assert batch.extra["grown"].tolist() == [[2.0] * 3] * 8 and not batch.extra["grown"].requires_grad
    assert batch.extra["tiny"].tolist() == [[1.0] * 2] * 8


def test_what_a_run_is_measured_by_passes_through_its_stages(folder, tmp_path):
    """A validation set may lack the members."""
    bare = write_set(tmp_path / "bare", members=lambda number: {}, total=5)
    address = "tests.unit.test_stages:numbered"
    data = Data(Data.Config(train=folder, val=bare, extra={"caption": "txt"}, stages=[address], workers=0))
    assert data.val is not None
    measured = slots(list(eval_stream(Monitor.Config(batch=4), data, data.val, (8, 8), "cpu")))
    real = [sample for sample in measured.values() if sample["weight"]]
    assert len(real) == 5 and all(sample["caption"] is None for sample in real)
    assert [sample["tokens"].tolist() for sample in real] == [[n, 0] for n in range(5)]
    assert [sample["label"] for sample in real] == [n + 1 for n in range(5)]


def test_swapped_views_are_both_kept(folder):
    from penstock.augment.simclr import SimCLR

    def swapped(samples):
        for sample in samples:
            yield sample | {"views": sample["views"][::-1]}

    augment = SimCLR(SimCLR.Config(size=8))
    plain, turned = (take(stream(folder, after, augment=augment), 1)[0] for after in ([], [swapped]))
    assert torch.equal(plain.views[0], turned.views[1]) and torch.equal(plain.views[1], turned.views[0])


MINE = """
import torch

def shout(samples):
    for sample in samples:
        yield sample | {"caption": (sample["caption"] or "").upper()}

number = 5
"""


def test_stages_of_a_recipe_are_found_from_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_test").mkdir()
    (tmp_path / "mine_of_test" / "__init__.py").write_text("")
    (tmp_path / "mine_of_test" / "words.py").write_text(MINE)
    (tmp_path / "broken_of_test.py").write_text("import no_such_module")
    found = slots(take(stream(folder, extra={"caption": "txt"}, stages=["mine_of_test.words:shout"]), 2))
    assert all(s["caption"] == members_of(s["number"]).get("caption", "").upper() for s in found.values())
    for address, said in {
        "mine_of_test.words:whisper": "mine_of_test.words has no such name",
        "mine_of_test.words:number": "has a int of that name",
        "mine_of_test.word:shout": "cannot be imported: ModuleNotFoundError",
        "broken_of_test:shout": "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        "mine_of_test.words": "write package.module:function",
        "os:system('rm x')": "write package.module:function",
    }.items():
        with pytest.raises(ValidationError) as caught:
            Data.Config(train=folder, stages=[address])
        assert said in str(caught.value)
        assert caught.value.errors()[0]["loc"] == ("stages",)


def test_stored_answers_and_stages_do_not_go_together(folder):
    data = Data.Config(train=folder, workers=0, pool=2)
    augment = NoAugmentation(NoAugmentation.Config(size=8))
    more: dict[str, Any] = {
        "batch": 8,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "seed": 0,
        "clock": Clock(9, 8, TOTAL),
    }
    with pytest.raises(InputError, match=r"data\.stages: a teacher's stored answers"):
        TrainStream(data, augment, **more, sidecar=object(), stages=[numbered])  # type: ignore[arg-type]
