"""Cached answers: precise enough, of the very pixels the student sees, tied to what made them, damage noticed."""

import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from finetune import cache_writer
from finetune.answers import CACHE, Cache, Layout, conflicts, restore
from finetune.cache_facts import check_again, facts
from finetune.cache_writer import FAILED, Plan, Pool
from finetune.distillation import Answer
from finetune.teacher import main
from penstock.backbones import Backbone
from penstock.errors import InputError, RunFailed
from penstock.export import export_classifier
from penstock.head import Head
from penstock.mixing import Mixing
from penstock.streams.loader import _joined, assemble
from penstock.streams.reader import Fault
from penstock.streams.sets.index import load_records
from penstock.streams.sets.manifest import MANIFEST, Manifest
from penstock.streams.sidecar import shard_name
from tests import cached, distillation
from tests.cached import CLASSES, SIZES, VIEWS
from tests.distillation import CASES
from tests.shards import damage, write_set
from tests.trees import fingerprints, read_plainly

TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return cached.make_set(tmp_path_factory.mktemp("answers") / "set")


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Path:
    """A cache; not to be changed."""
    out = tmp_path_factory.mktemp("cache") / "cache"
    cached.write(out, cached.recipe(folder))
    return out


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def opened(out: Path, made: Any) -> Cache:
    return Cache.open(out, cached.identity(made))


# Precision -------------------------------------------------------------------------------------


def loss(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL of two [N, K] of logits, in fp64."""
    p, q = (np.array((each.double() / temperature).tolist()) for each in (teacher, student))
    p, q = (each - np.log(np.exp(each - each.max(1, keepdims=True)).sum(1, keepdims=True)) for each in (p, q))
    p -= p.max(1, keepdims=True)
    p, q = p - np.log(np.exp(p).sum(1, keepdims=True)), q - q.max(1, keepdims=True)
    q -= np.log(np.exp(q).sum(1, keepdims=True))
    return torch.tensor(temperature**2 * (np.exp(p) * (p - q)).sum(1))


def extra_of(rows: np.ndarray) -> dict[str, torch.Tensor]:
    """As a stream hands rows over."""
    return {name: _joined([row[name] for row in rows]) for name in rows.dtype.names or ()}


def kept(logits: torch.Tensor, top: int) -> torch.Tensor:
    """The top classes' log-probabilities and the rest spread evenly, one row at a time, in fp64."""
    rows = []
    for row in logits.double().log_softmax(1).numpy():
        order = np.argsort(-row, kind="stable")
        even = np.exp(row[order[top:]]).sum() / max(len(row) - top, 1)
        made = np.full(len(row), np.log(even)) if even else row.copy()
        made[order[:top]] = row[order[:top]]
        rows.append(made)
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize(("classes", "top"), [(10, 10), (1000, 50), (1000, 1000), (300, 7), (10, 1)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("sharpness", [1.0, 3.0, 6.0])
def test_losses_agree_with_those_of_the_answers_as_they_were(classes, top, temperature, sharpness):
    """Against the same classes in fp64: what 16 bits cost. What leaving classes out costs depends on the teacher."""
    generator = torch.Generator().manual_seed(classes + top)
    logits = torch.randn(200, classes, generator=generator) * sharpness
    student = logits / 2 + torch.randn(200, classes, generator=generator)
    restored = restore(extra_of(Layout(classes, top).pack(logits)), classes)
    assert restored.dtype == torch.float32
    exact, found = loss(kept(logits, top), student, temperature), loss(restored, student, temperature)
    assert (found - exact).abs().max() < 1e-3
    assert (found - exact).mean().abs() < 1e-4


def of_answers_alone(case: str) -> bool:
    loss = distillation.setting(case)[0].module
    return not (loss.features or loss.stages)


@pytest.mark.parametrize("case", [case for case in CASES if of_answers_alone(case)])
def test_every_loss_is_what_it_is_online(case):
    """Logits of any common shift: some losses see it."""
    loss, student, teacher = distillation.setting(case, rows=12)
    shifts = 5 * torch.randn(12, 1, generator=torch.Generator().manual_seed(3))
    logits = (2 * teacher.logits + shifts).float()
    restored = restore(extra_of(Layout(5, 5).pack(logits)), 5)
    assert (restored - logits).abs().max() < 1e-3
    online, again = (loss(student, Answer(each.double())) for each in (logits, restored))
    assert (again - online).abs().max() < 1e-3
    unshifted = loss(student, Answer(logits.double().log_softmax(1)))
    assert ((unshifted - online).abs().max() > 0.1) == (case in ("binary_targets", "relational, logits"))


def test_losses_that_make_much_of_unlikely_classes_say_so():
    raw = {case for case in CASES if distillation.setting(case)[0].module.raw_logits}
    assert raw == {"binary_targets", "relational, logits", "soft_targets, standardized"}


def test_losses_of_raw_logits_need_all_classes(folder, written, tmp_path):
    made = cached.recipe(folder)
    opened(written, made).check_use(made, ["binary_targets"])
    cached.write(tmp_path, made, top=4)
    opened(tmp_path, made).check_use(made, [])
    with pytest.raises(InputError, match=r"task.losses.relational.* the 4 likeliest of 10; .*--top 10"):
        opened(tmp_path, made).check_use(made, ["relational"])


def test_another_precision_is_warned_of(folder, written, caplog):
    made = cached.recipe(folder)
    for precision, warned in (("fp32", False), ("fp16", False), ("bf16", True)):
        caplog.clear()
        made.engine.precision = precision
        opened(written, made).check_use(made, [])
        assert ("answered in fp32" in caplog.text) == warned


def test_of_a_sure_teacher_the_fifty_likeliest_of_a_thousand_say_all():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 1000, generator=generator)
    logits.scatter_add_(1, torch.randint(0, 1000, (100, 40), generator=generator), torch.full((100, 40), 18.0))
    student = logits / 2 + torch.randn(100, 1000, generator=generator)
    restored = restore(extra_of(Layout(1000, 50).pack(logits)), 1000)
    assert (loss(restored, student, 1.0) - loss(logits, student, 1.0)).abs().max() < 1e-3


def test_what_rows_hold():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)) * 4
    logits[0] = 7.0  # ties go to the first class
    rows, exact = Layout(300, 20).pack(logits), logits.double().softmax(1)
    assert rows.dtype.itemsize == 20 * 2 + 20 * 2 + 12
    assert rows["classes"][0].tolist() == list(range(20))
    probabilities = np.exp(rows["logs"] * rows["low"][:, None].astype(np.float64) / 65535)
    assert (np.diff(probabilities, axis=1) <= 0).all()
    assert np.abs(probabilities.sum(1) + np.exp(rows["rest"]) - 1).max() < 2e-4
    assert np.abs(probabilities - np.take_along_axis(exact.numpy(), rows["classes"].astype(int), 1)).max() < 1e-4
    assert Layout(10, 10).kind.itemsize == 28
    assert [Layout(n, 1).kind["classes"].base.itemsize for n in (256, 257, 65536, 65537)] == [1, 2, 2, 4]


@pytest.mark.parametrize("logits", [[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0], [1e-8, 0.0, 0.0]])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_extreme_answers(logits, top):
    restored = restore(extra_of(Layout(3, top).pack(torch.tensor([logits]))), 3)
    assert restored.isfinite().all()
    exact = torch.tensor([logits], dtype=torch.float64).softmax(1)
    if top == 3:
        assert torch.allclose(restored.double().softmax(1), exact, atol=1e-5)
    assert restored.softmax(1)[0, 0] == pytest.approx(float(exact[0, 0]), abs=1e-5)


# The same pixels, the right answers -------------------------------------------------------------


READINGS: list[tuple[int, int, dict[str, Any]]] = [  # ranks, workers, options
    *((world, workers, {}) for world, workers in ((1, 0), (2, 0), (1, 2))),
    *((1, 0, options) for options in ({"labels": "50%"}, {"decode": "whole"}, {"cache": "ram"}, {"channels": 1})),
]


@pytest.mark.parametrize("repeats", [1, 2, 4])
@pytest.mark.parametrize(("world", "workers", "options"), READINGS)
def test_the_student_sees_the_pixels_that_the_teacher_answered(folder, repeats, world, workers, options):
    """Bit for bit, whatever else the two do."""
    augment = {"color_jitter": 0.0} if options.get("channels") == 1 else {}
    writer = cached.recipe(folder, augment=augment, **{n: v for n, v in options.items() if n != "labels"})
    data = Manifest.load(folder)
    pool = Pool(writer, data, cached.teacher(), cached.identity(writer), torch.device("cpu"))
    plan, seen = Plan(data, range(len(SIZES)), VIEWS, 7, pool.knobs), {}
    for number in range(len(plan.spans)):
        micro = plan.micro(number)
        assert micro is not None
        batch = assemble(micro, pool.images, pool.augment, writer.seed)
        for slot, key in enumerate(batch.keys):
            seen[key, slot % VIEWS] = batch.views[0][slot]
    assert len(seen) == TOTAL * VIEWS
    made = cached.recipe(folder, augment=augment, repeats=repeats, workers=workers, **options)
    served: dict[str, int] = {}
    batches = [b for rank in range(world) for b in cached.take(cached.student(made, None, 12, rank, world), 10)]
    for _, key, view in sorted(
        (p, b.keys[i], b.views[0][i]) for b in batches for i, p in enumerate(b.positions.tolist())
    ):
        assert torch.equal(view, seen[key, served.get(key, 0) % VIEWS]), key
        served[key] = served.get(key, 0) + 1


@pytest.mark.parametrize(("repeats", "workers", "top"), [(1, 0, 10), (2, 2, 10), (1, 0, 4)])
def test_answers_come_with_their_views(folder, tmp_path, repeats, workers, top):
    cached.write(tmp_path, cached.recipe(folder), top)
    made = cached.recipe(folder, repeats=repeats, workers=workers)
    compared = 0
    for batch in cached.take(cached.student(made, opened(tmp_path, made)), 8):
        assert batch.weights.all()
        expected, found = cached.answered(batch.views[0]), restore(batch.extra, len(CLASSES)).log_softmax(1)
        if top == len(CLASSES):
            assert (found.exp() - expected.exp()).abs().max() < 1e-4
        best = expected.sort(1, descending=True).indices[:, :top]
        assert (found.gather(1, best) - expected.gather(1, best)).abs().max() < 2e-3
        assert not torch.equal(expected.argmax(1), expected.argmax(1).roll(1))  # a shifted answer would be noticed
        compared += len(batch)
    assert compared == 96


def test_what_is_written_is_plain(folder, written):
    """A WebDataset of arrays that anyone can read, in the order of the set."""
    theirs, samples = Manifest.load(folder), read_plainly(written)
    assert len(samples) == TOTAL
    for number, shard in enumerate(theirs.shards):
        keys = [key.decode() for key in load_records(folder / shard.index)["key"]]
        mine = load_records(written / shard_name(number).replace(".tar", ".index.npy"))
        assert [key.decode() for key in mine["key"]] == keys
    import io

    for sample in samples.values():
        table = np.load(io.BytesIO(sample["answers.npy"]), allow_pickle=False)
        assert table.shape == (VIEWS,)
        assert table.dtype == Layout(10, 10).kind


def test_two_writings_are_equal_and_an_old_one_is_kept(folder, written, tmp_path):
    done = cached.write(tmp_path / "again", cached.recipe(folder))
    assert (done.views, done.kept) == (TOTAL * VIEWS, 0)
    assert fingerprints(tmp_path / "again") == fingerprints(written)
    done = cached.write(tmp_path / "again", cached.recipe(folder))
    assert (done.views, done.kept) == (0, len(SIZES))


def test_facts_and_a_second_asking(folder, written):
    made = cached.recipe(folder)
    pool = Pool(made, Manifest.load(folder), cached.teacher(), cached.identity(made), torch.device("cpu"))
    cache = opened(written, made)
    found, checked = facts(pool, cache), check_again(pool, cache, 40, 16)
    assert (found.unreadable, found.images, found.mass) == (0, TOTAL, 1.0)
    assert 20 < checked.views <= 40  # some were drawn twice
    assert checked.apart < 1e-4
    right = total = 0
    for batch in cached.take(cached.student(made, None, TOTAL), VIEWS):  # each view of the pool once
        right, total = (
            right + int((cached.answered(batch.views[0]).argmax(1) == batch.labels).sum()),
            total + len(batch),
        )
    assert found.top1 == pytest.approx(100 * right / total)
    assert facts(pool, cache, most=7).images == 7
    other = Pool(made, Manifest.load(folder), cached.teacher(1), cached.identity(made), torch.device("cpu"))
    assert check_again(other, cache, 40, 16).apart > 0.01


# Another cache, damage ----------------------------------------------------------------------------


def test_a_mismatch_lists_every_difference(folder, written, tmp_path):
    other = write_set(tmp_path / "other", [4]).root
    made = cached.recipe(other, seed=5, augment={"scale": (0.1, 1.0), "flip": 0.0}, pool=4, decode="whole")
    with pytest.raises(InputError) as error:
        Cache.open(written, cached.identity(made, cached.teacher(1)))
    for word in ("another teacher", "augment.flip: 0.5 instead of 0.0", "augment.scale"):
        assert word in str(error.value)
    for word in ("data.pool: 3 instead of 4", "data.decode", "another training set"):
        assert word in str(error.value)
    assert len(str(error.value).split(": ", 1)[1].split("; ")) == 7  # the last one is the remedy


def test_the_order_of_classes_matters(folder, written):
    made = cached.recipe(folder)
    swapped = cached.identity(made).__class__(
        **{**vars(cached.identity(made)), "classes": (*CLASSES[1::-1], *CLASSES[2:])}
    )
    with pytest.raises(InputError, match=r"number 0 is class0 instead of class1, the same in another order"):
        Cache.open(written, swapped)


def test_how_a_set_without_large_images_is_decoded_does_not_matter(tmp_path):
    folder = write_set(tmp_path, [4]).root
    assert cached.identity(cached.recipe(folder)) == cached.identity(cached.recipe(folder, decode="whole", cache="ram"))


def test_another_plan_in_the_folder_is_refused(folder, written, copy, tmp_path):
    with pytest.raises(InputError, match="10 most likely classes instead of 5; give another --out"):
        cached.write(copy, cached.recipe(folder), top=5)
    with pytest.raises(InputError, match="batch 8 instead of 16"):
        cached.write(copy, cached.recipe(folder), batch=16)
    with pytest.raises(InputError, match=r"data\.pool: 3 instead of 5"):
        cached.write(copy, cached.recipe(folder, pool=5))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds thesis.tex"):
        cached.write(tmp_path / "full", cached.recipe(folder))
    assert fingerprints(copy) == fingerprints(written)


@pytest.mark.parametrize("change", ["cut", "missing", "no manifest", "of another", "not a cache", "edited"])
def test_a_cache_that_is_not_whole_is_refused_at_start(folder, copy, change):
    made, tar = cached.recipe(folder), copy / shard_name(2)
    if change == "cut":
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    elif change == "missing":
        tar.unlink()
    elif change == "no manifest":
        (copy / MANIFEST).unlink()
    elif change == "of another":
        shutil.rmtree(copy)
        cached.write(copy, made, top=6)
        opened(copy, made).__class__(copy, cached.identity(made), 10, opened(copy, made).about).save()
    elif change == "not a cache":
        (copy / CACHE).unlink()
    else:
        (copy / CACHE).write_text((copy / CACHE).read_text().replace('"top": 10', '"top": 9'))
    words = {
        "cut": "bytes instead of",
        "missing": "is missing",
        "no manifest": "unfinished",
        "of another": "two caches",
    }
    words |= {"not a cache": "is no cache", "edited": "was changed"}
    with pytest.raises(InputError, match=words[change]):
        cached.student(made, opened(copy, made))


def test_a_flipped_byte_is_a_slot_of_weight_zero(folder, copy):
    made = cached.recipe(folder)
    key = damage(Manifest.load(copy), 7)
    for workers in (0, 1):
        (batch,) = cached.take(cached.student(cached.recipe(folder, workers=workers), opened(copy, made), TOTAL), 1)
        slot = batch.keys.index(key)
        assert batch.weights.sum() == TOTAL - 1
        assert batch.weights[slot] == 0
        assert not batch.views[0][slot].any()
        (fault,) = batch.faults
        assert (fault["key"], "CRC" in fault["reason"], "answers-000002.tar" in fault["reason"]) == (key, True, True)
        uniform = restore(batch.extra, 10)[slot].softmax(0)
        assert torch.allclose(uniform, torch.full((10,), 0.1))


def test_an_unreadable_image_has_no_answers_and_is_counted(tmp_path):
    folder = cached.make_set(tmp_path / "set")
    key = damage(Manifest.load(folder), 9)
    made = cached.recipe(folder)
    cached.write(tmp_path / "out", made)
    pool = Pool(made, Manifest.load(folder), cached.teacher(), cached.identity(made), torch.device("cpu"))
    cache = opened(tmp_path / "out", made)
    assert facts(pool, cache).unreadable == 1
    (batch,) = cached.take(cached.student(made, cache, TOTAL), 1)
    assert [fault["key"] for fault in batch.faults] == [key]
    with pytest.raises(Fault, match="could not be read when they were made"):
        cache.sidecar(Manifest.load(folder)).read(2, 4, key, 0)
    with pytest.raises(Fault, match="those of another sample"):
        cache.sidecar(Manifest.load(folder)).read(2, 4, "sample000001", 0)


def test_no_damage_goes_unnoticed(folder, written, tmp_path):
    """Bytes flipped and files cut anywhere: refused, or a fault, or the very answers."""
    made, draw = cached.recipe(folder), random.Random(0)
    data, expected = Manifest.load(folder), {}
    whole = opened(written, made).sidecar(data)
    places = [
        (s, n, k.decode())
        for s, i in enumerate(data.shards)
        for n, k in enumerate(load_records(folder / i.index)["key"])
    ]
    expected = {place: whole.rows(*place).tobytes() for place in places}
    files = sorted(path.name for path in written.iterdir())
    files += 3 * [name for name in files if name.endswith(".tar")]
    outcomes = {"refused": 0, "fault": 0}
    for trial in range(100):
        out = Path(shutil.copytree(written, tmp_path / str(trial)))
        path = out / draw.choice(files)
        content = bytearray(path.read_bytes())
        place = draw.randrange(min(len(content), 9000))  # beyond it is mostly padding
        if trial % 3:
            content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content if trial % 3 else content[:place])
        try:
            found = opened(out, made).sidecar(data)
            for each in places:
                try:
                    assert found.rows(*each).tobytes() == expected[each], path
                except Fault:
                    outcomes["fault"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 3, outcomes


def test_a_teacher_of_not_a_number_is_refused(folder, tmp_path):
    broken = cached.teacher()
    broken.network.weight[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="not numbers"):
        cached.write(tmp_path, cached.recipe(folder), teaches=broken)
    assert not list(tmp_path.glob("*.tar*"))


# Interrupted ---------------------------------------------------------------------------------------


def slowly(out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    own = cached.teacher()
    forward = own.network.forward

    def slow(images: torch.Tensor, stages: int) -> Any:
        time.sleep(0.1)
        return forward(images, stages)

    own.network.forward = slow
    cached.write(out, cached.recipe(folder), teaches=own)


def test_a_killed_writing_goes_on_with_what_was_finished(folder, written, tmp_path):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(out, folder))
    process.start()
    assert process.pid is not None
    while not (out / shard_name(1)).is_file():
        assert process.is_alive()
        time.sleep(0.02)
    while not list(out.glob(".*.tmp-*")):
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(InputError, match="unfinished"):
        opened(out, cached.recipe(folder))
    content = bytearray((out / shard_name(0)).read_bytes())
    content[-600] ^= 1  # of the end mark, so the tar is damaged: it is written again
    (out / shard_name(0)).write_bytes(content)
    kept = (out / shard_name(1)).stat().st_mtime_ns
    done = cached.write(out, cached.recipe(folder))
    assert done.kept == 1
    assert (out / shard_name(1)).stat().st_mtime_ns == kept
    assert fingerprints(out) == fingerprints(written)


def test_who_is_awaited_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_writer, "WAIT", 0.01)
    monkeypatch.setattr(cache_writer, "TELL", 0.02)
    answers = iter([True, *[False] * 10])
    monkeypatch.setattr(cache_writer, "is_there", lambda folder, shard: next(answers, True))
    cache_writer._wait(tmp_path, 2)
    assert "waiting for other ranks to write the shards 1 (rank 0)" in caplog.text
    monkeypatch.setattr(cache_writer, "is_there", lambda folder, shard: False)
    (tmp_path / FAILED.format(0)).touch()
    with pytest.raises(RunFailed, match="rank 0 could not go on"):
        cache_writer._wait(tmp_path, 2)


# The command ----------------------------------------------------------------------------------------


def exported(out: Path, classes: Any) -> Path:
    backbone = Backbone(Backbone.Config(name="test_resnet", size=16))
    head = Head(Head.Config(init_std=0.5), backbone.dim, len(classes), backbone)
    parts = (("backbone", backbone), ("head", head))
    state = {f"{part}.{name}": value for part, module in parts for name, value in module.state_dict().items()}
    return export_classifier(state, backbone.config, Head.Config(), out, classes)


@pytest.fixture
def student_recipe(folder, tmp_path) -> Path:
    export = exported(tmp_path / "teacher", Manifest.load(folder).classes)
    values = {
        "name": "student",
        "duration": "2 steps",
        "batch": 8,
        "data": {"train": str(folder), "val": str(folder), "workers": 0},
        "augment": {"name": "standard", "size": 16},
        "backbone": {"name": "test_resnet", "size": 16},
        "task": {"name": "distill", "teacher": str(export)},
        "optim": {"lr": 0.01},
        "engine": {"precision": "fp32"},
    }
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--views", "2", "--top", "11"], "there are 10 classes"),
        (["--views", "2", "task=classify"], "its task is not distill"),
        ([], "--views 10"),
        (["--views", "2", "mix.mixup=0.2"], "single images"),
        (["--views", "2", "augment.size={name: linear, start: 16, end: 24}"], "follows a curve"),
        (["--views", "2", "--batch", "0"], "at least 1"),
        (["--views", "0"], "pool"),
    ],
)
def test_what_cannot_be_cached_is_refused(student_recipe, tmp_path, capsys, words, said):
    assert main([str(student_recipe), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def printed(rank, world, words) -> str:
    with redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    return " ".join(out.getvalue().split())


def test_the_command_writes_a_cache_and_says_so(student_recipe, folder, tmp_path, ranks):
    words = [str(student_recipe), "--out", str(tmp_path / "out"), "--views", "2", "--top", "4", "--verify", "30"]
    (said,) = ranks(1).run(printed, words)
    assert f"images {TOTAL}" in said
    assert f"{2 * TOTAL}, 2 of each image" in said
    assert "at temperature 4" in said
    assert f"data.pool=2 task.cache={tmp_path / 'out'}" in said.replace("- ", "-")
    cache = Cache.read(tmp_path / "out")
    assert cache is not None
    assert cache.top == 4
    assert "all were there" in ranks(1).run(printed, words)[0]


def test_mixing_is_a_conflict(folder):
    made = cached.recipe(folder)
    made.mix = Mixing.Config(cutmix=1.0)
    assert [line.split(":")[0] for line in conflicts(made)] == ["mix.cutmix"]
    made.mix, made.data = Mixing.Config(), made.data.model_copy(update={"pool": None})
    assert [line.split(":")[0] for line in conflicts(made)] == ["data.pool"]
