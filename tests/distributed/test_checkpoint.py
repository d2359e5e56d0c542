"""Checkpoints: exact on the same ranks, elastic over ranks and stages, whole or absent, and never unpickled."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from penstock.checkpoint import Checkpoints, name_of, verify
from penstock.errors import InputError
from tests.distributed.test_engine import STEPS, build, train


def store(folder: str, **options) -> Checkpoints:
    return Checkpoints(Checkpoints.Config(**options), Path(folder))


def straight(rank, world, zero, precision):
    engine = build(zero, precision, 2, world)
    train(engine, rank, world, 0, STEPS)
    return engine.weights()


def first_half(rank, world, folder, zero, precision):
    engine = build(zero, precision, 2, world)
    train(engine, rank, world, 0, 2)
    assert store(folder).save(engine, 2, {"samples": 16}) is None
    return engine.weights()


def second_half(rank, world, folder, zero, precision):
    engine = build(zero, precision, 2, world, seed=77)  # other weights: all must come from the checkpoint
    state, warnings = store(folder, resume="must").restore(engine)
    assert state["step"] == 2 and state["samples"] == 16 and not warnings
    train(engine, rank, world, 2, STEPS)
    return engine.weights()


STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16_pure"), (2, "bf16_pure")]


@pytest.mark.parametrize("zero,precision", STAGES)
def test_resume_is_bitwise(ranks, tmp_path, zero, precision):
    want = ranks(2).run(straight, zero, precision)[0]
    ranks(2).run(first_half, str(tmp_path), zero, precision)
    for got in ranks(2).run(second_half, str(tmp_path), zero, precision):
        assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize(
    "zero,then_world,then_zero", [(0, 1, 0), (1, 1, 1), (2, 4, 2), (3, 1, 3), (0, 4, 3), (3, 1, 0)]
)
def test_another_number_of_ranks_or_stage(ranks, tmp_path, zero, then_world, then_zero):
    want = ranks(2).run(straight, zero, "fp32")[0]
    ranks(2).run(first_half, str(tmp_path), zero, "fp32")
    for got in ranks(then_world).run(second_half, str(tmp_path), then_zero, "fp32"):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=1e-6, rtol=0)


def corrupt_then_resume(rank, world, folder):
    engine = build(0, "fp32", 1, world)
    checkpoints = store(folder, keep=5)
    for step in (1, 2):
        train(engine, rank, world, step - 1, step)
        checkpoints.save(engine, step, {})
    torch.distributed.barrier()
    if rank == 0:
        file = Path(folder) / "checkpoints" / name_of(2) / "rank-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    state, warnings = checkpoints.restore(build(0, "fp32", 1, world))
    return state["step"], warnings


def test_one_flipped_bit_falls_back_to_the_one_before(ranks, tmp_path):
    for step, warnings in ranks(2).run(corrupt_then_resume, str(tmp_path)):
        assert step == 1 and "rank-00001.safetensors" in warnings[0]


def full_disk(rank, world, folder):
    engine = build(0, "fp32", 1, world)
    checkpoints = store(folder)
    checkpoints.save(engine, 1, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:  # only one rank's disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        trouble = checkpoints.save(engine, 2, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    return (
        trouble,
        [path.name for path in checkpoints.found()],
        sorted(path.name for path in checkpoints.folder.iterdir()),
    )


def test_a_full_disk_keeps_the_last_good_one(ranks, tmp_path):
    for trouble, found, listed in ranks(2).run(full_disk, str(tmp_path)):
        assert "File too large" in trouble
        assert found == listed == [name_of(1)]


def retained(rank, world, folder):
    engine = build(0, "fp32", 1, world)
    checkpoints = store(folder, keep=2)
    for step in range(1, 7):
        checkpoints.save(engine, step, {}, forever=step == 2)
    return [path.name for path in checkpoints.found()]


def test_retention(ranks, tmp_path):
    assert ranks(2).run(retained, str(tmp_path))[0] == [name_of(step) for step in (2, 5, 6)]


def other_model(rank, world, folder):
    from penstock.engine import Engine
    from penstock.optim import Optim
    from tests.distributed.test_engine import OPTIM
    from tests.toy import Encoder, Toy

    store(folder).save(build(0, "fp32", 1, world), 1, {})
    task = Toy()
    task.backbone = Encoder(width=32)
    engine = Engine(task, Optim(OPTIM).build(task, 8), Engine.Config(precision="fp32"), 4)
    try:
        store(folder).restore(engine)
    except InputError as error:
        return str(error)


def test_a_checkpoint_of_another_model_is_refused(ranks, tmp_path):
    assert all(
        "another model" in message and "name=" in message for message in ranks(2).run(other_model, str(tmp_path))
    )


def resume_rules(rank, world, folder):
    engine, messages = build(0, "fp32", 1, world), []
    for rule in ("must", "never"):
        try:
            store(folder, resume=rule).restore(engine)
        except InputError as error:
            messages.append(str(error))
        store(folder).save(engine, 1, {})
    return messages


def test_resume_must_and_never(ranks, tmp_path):
    must, never = ranks(2).run(resume_rules, str(tmp_path))[0]
    assert "there is none" in must and "already holds a run" in never


def save_then_die(rank, world, folder, kill_at):
    """Save one checkpoint, then die in the middle of the second one's writing."""
    import penstock.checkpoint as module

    engine = build(0, "fp32", 1, 1)
    store(folder).save(engine, 1, {})
    count, plain = 0, module._write

    def dying(path, content):
        nonlocal count
        count += 1
        if count == kill_at:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(path, content)

    module._write = dying
    store(folder).save(engine, 2, {})


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_crash_while_saving_leaves_the_last_good_one(tmp_path, kill_at):
    from tests.pool import Pool

    pool = Pool(1)
    with pytest.raises((AssertionError, EOFError)):
        pool.run(save_then_die, str(tmp_path), kill_at)
    pool.stop()
    checkpoints = store(str(tmp_path))
    assert [path.name for path in checkpoints.found()] == [name_of(1)]
    assert checkpoints.newest()[0].name == name_of(1)


def test_every_kind_of_damage_is_noticed(tmp_path):
    folder = tmp_path / name_of(1)
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text(
        json.dumps({"format": 1, "files": {"state.json": {"bytes": 2, "sha256": "x"}}})
    )
    assert "checksum" in verify(folder)
    (folder / "state.json").write_text("{} ")
    assert "3 bytes instead of 2" in verify(folder)
    (folder / "state.json").unlink()
    assert "missing" in verify(folder)
    (folder / "manifest.json").write_text("[]")
    assert "cannot be read" in verify(folder)
