"""Requests to one store: what an answer that breaks off, changes midway or is misread comes to."""

import io

import numpy as np
import pytest

from penstock.streams.sets.remote.store import Failed, Store, Unusable
from tests.remote import Wire

OLD, NEW = (np.random.default_rng(seed).integers(0, 256, 6 << 20, dtype=np.uint8).tobytes() for seed in range(2))


@pytest.fixture
def wire(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    found = Wire(folder=tmp_path)
    yield found
    found.close()


def fetched(store: Store, name: str = "a") -> bytes:
    file = io.BytesIO()
    file.truncate(store.download(name, file))
    return file.getvalue()


@pytest.mark.parametrize("size", [len(NEW), 4 << 20, 1 << 20])
def test_two_versions_are_never_glued_together(wire, monkeypatch, size):
    answered, seen = wire._from_folder, []

    def replaced(method, path, asked, body):
        seen.append(asked)
        if len(seen) == 2:
            (wire.folder / "a").write_bytes(NEW[:size])
        return answered(method, path, asked, body)

    monkeypatch.setattr(wire, "_from_folder", replaced)
    wire.spoil("cut")
    assert fetched(Store(wire.url, 3, 2.0)) == NEW[:size]


def test_an_answer_cut_by_a_server_without_ranges_begins_anew(wire):
    wire.ranges = False
    wire.spoil("cut")
    assert fetched(Store(wire.url, 3, 2.0)) == OLD


def test_an_answer_without_a_tag_begins_anew(wire, monkeypatch):
    answered = wire._from_folder

    def untagged(*asked):
        status, headers, content = answered(*asked)
        return status, {name: value for name, value in headers.items() if name != "ETag"}, content

    monkeypatch.setattr(wire, "_from_folder", untagged)
    wire.spoil("cut")
    assert fetched(Store(wire.url, 3, 2.0)) == OLD
    assert [span for _, _, span, _ in wire.log] == ["", ""]


def test_a_number_in_a_name_is_no_status(wire):
    (wire.folder / "shard-000416.tar").write_bytes(OLD)
    wire.spoil("500", times=1)
    assert fetched(Store(wire.url, 3, 2.0), "shard-000416.tar") == OLD
    wire.spoil("500", times=None)
    (wire.folder / "manifest.json").write_text("{}")
    with pytest.raises((Failed, Unusable), match="500"):
        Store(wire.url, 1, 2.0).range("shard-000416.tar", 0, 10, len(OLD))


def test_a_full_disk_is_no_failure_of_the_network(wire):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    store = Store(wire.url, 3, 2.0)
    with pytest.raises(OSError, match="No space left"):
        store.download("a", Full())
    assert store.retried == 0


def test_a_store_out_of_reach_is_said_once_and_briefly(wire):
    wire.spoil("reset", times=None)
    with pytest.raises(Unusable) as caught:
        Store(wire.url, 0, 2.0).size("a")
    said = str(caught.value)
    assert said.count("error") == 2 and said.count(wire.url) == 2 and "Generic" not in said and len(said) < 250
