"""Thousands of damaged and malicious sets: never a crash, a hang, a silent loss, a wrong pair, a file out of place.

PENSTOCK_FUZZ=100000 PENSTOCK_FUZZ_SEED=7 pytest -m slow tests/unit/test_fuzz_streams.py  # a longer search
"""

import contextlib
import io
import os
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.augment.none import NoAugmentation
from penstock.errors import InputError
from penstock.streams.decode import DecodeError, decode
from penstock.streams.images import Images
from penstock.streams.loader import Micro, assemble
from penstock.streams.sets.foreign import index_folder
from penstock.streams.sets.index import read_records
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.tar import TarError
from penstock.streams.sets.verify import verify, verify_shard
from tests import fuzz
from tests.shards import pixels_of, png
from tests.trees import image_bytes
from tests.unit.test_train_stream import stream

SEED, TARS, MANIFESTS, INDICES = 0, 1500, 400, 300  # tars: of each form
FORMS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
LONGEST = 5.0  # seconds a mutation may take, on a busy machine
Sample = tuple[str, bytes, int]  # key, encoded image, label


class Intact:
    """A set of one shard before anything happens to it."""

    def __init__(self, folder: Path, form: str):
        folder.mkdir()
        long = "" if form == "ustar" else "a-long-name-" * 15
        with tarfile.open(folder / "x.tar", "w", format=FORMS[form]) as tar:
            for number in range(5):
                image = ("jpg", image_bytes(number)) if number == 3 else ("png", png(pixels_of(number)))
                for suffix, content in (image, ("cls", str(number * 3).encode())):
                    info = tarfile.TarInfo(f"{long}sample{number}.{suffix}")
                    info.size, info.mtime = len(content), 1.5 if form == "pax" else 0
                    tar.addfile(info, io.BytesIO(content))
        index_folder(folder, 1, show=False)
        self.folder, self.tar, self.index = folder, folder / "x.tar", folder / "x.index.npy"
        self.data = self.tar.read_bytes()
        self.samples = walked(self.data)
        self.tars = fuzz.Tars(self.data)
        self.manifest = Manifest.load(folder)
        self.images = Images(self.manifest)  # opened while all was well
        self.whole = served(self.images)
        self.pixels = {key: decode(image) for key, image, _ in self.samples}
        assert self.whole.weights.tolist() == [1.0] * 5

    def write(self, data: bytes) -> None:
        """In place, so that a descriptor that is open sees it."""
        with self.tar.open("r+b") as file:
            file.write(data)
            file.truncate()


def walked(data: bytes) -> list[Sample]:
    """The samples of a tar by Python's own reader and WebDataset's rule for names."""
    groups: list[tuple[str, dict[str, bytes]]] = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for item in tar:
            if not item.isfile() or item.name.startswith("__"):
                continue
            folder, _, base = item.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not groups or groups[-1][0] != key:
                groups.append((key, {}))
            assert suffix.lower() not in groups[-1][1]
            groups[-1][1][suffix.lower()] = tar.extractfile(item).read()  # type: ignore[union-attr]
    found = []
    for key, fields in groups:
        (image,) = [content for suffix, content in fields.items() if suffix in ("jpg", "jpeg", "png", "webp")]
        found.append((key, image, label_of(fields)))
    return found


def label_of(fields: dict[str, bytes]) -> int:
    import json

    if "cls" in fields:
        return int(fields["cls"])
    return json.loads(fields["json"]).get("label", -1) if "json" in fields else -1


def served(images: Images) -> Any:
    count = images.manifest.shards[0].samples
    numbers = np.arange(count, dtype=np.int64)
    micro = Micro(numbers, np.zeros(count, np.int64), numbers, {"size": 8.0}, 0)
    return assemble(micro, images, NoAugmentation(NoAugmentation.Config(size=8)), seed=0)


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Fails what hangs, and names what fails."""

    def too_long(*_: Any) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed {seed()}, {what}")
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def seed() -> int:
    return int(os.environ.get("PENSTOCK_FUZZ_SEED", SEED))


def rounds(usual: int) -> int:
    return int(os.environ.get("PENSTOCK_FUZZ", 20 * usual))


@pytest.fixture
def guarded(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder to work in. Nothing may appear beside it, and no pickle may be opened."""
    trap = tmp_path / "sprung"
    monkeypatch.setenv("PENSTOCK_TRAP", str(trap))
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # a name that is relative to nothing would land here
    yield work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "work"], "something was written or run"
    assert not list(elsewhere.iterdir())
    assert not Path("/tmp/escape.png").exists()


def check_foreign(intact: Intact, mutation: fuzz.Mutation) -> bool:
    """What `index` makes of a tar that came from elsewhere: refused, or just what Python's reader finds in it."""
    try:
        records = read_records(mutation.data)
    except TarError as error:
        assert error.message
        assert 0 <= error.offset <= len(mutation.data)
        return False
    found = [
        (row["key"].decode(), mutation.data[int(row["offset"]) :][: int(row["size"])], int(row["label"]))
        for row in records
    ]
    assert found == walked(mutation.data)
    if intact.tars.pickle in mutation.data or b"\x1f\x8b" in mutation.data:
        decode_all(mutation.data)
    if mutation.plain:  # nobody wrote that tar so: whatever is left whole must be found
        for key, image, label in intact.samples:
            mine = [part.raw in mutation.data for part in intact.tars.parts if part.name.startswith(f"{key}.")]
            assert not all(mine) or (key, image, label) in found, f"{key} was lost without a word"
    return True


def decode_all(data: bytes) -> None:
    """Let webdataset decode all members by their names, as readers of our shards would; no pickle may be among them."""
    from webdataset.autodecode import Decoder
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    decoder = Decoder([])
    files = ({**file, "__url__": "x.tar"} for file in tar_file_iterator(io.BytesIO(data)))
    for sample in group_by_keys(files, handler=lambda _: True):
        for name, content in sample.items():
            if not name.startswith("__"):
                with contextlib.suppress(Exception):  # most are not what their names say
                    decoder({"__key__": sample["__key__"], name: content})
    assert not Path(os.environ["PENSTOCK_TRAP"]).exists(), "a pickle was opened"


def check_packed(intact: Intact, mutation: fuzz.Mutation) -> None:
    """What `verify` and the stream make of a packed shard whose bytes changed, under their feet or before."""
    intact.write(mutation.data)
    damage = verify_shard(intact.folder, intact.manifest.shards[0], True, lambda _: None)
    assert bool(damage) == (mutation.data != intact.data)
    records = np.load(intact.index)
    changed = {
        row["key"].decode()
        for row, (_, image, _) in zip(records, intact.samples, strict=True)
        if mutation.data[int(row["offset"]) :][: int(row["size"])] != image
    }
    named = " or ".join(each.sample for each in damage)
    assert not mutation.data or all(key in named.split(" or ") for key in changed), f"{changed - set(named)} not named"
    check_served(intact, served(intact.images), changed)
    if len(mutation.data) != len(intact.data):
        with pytest.raises(InputError, match=r"x\.tar"):
            Images(intact.manifest)


def check_served(intact: Intact, batch: Any, lost: set[str]) -> None:
    """Every sample in its place: its own pixels and label, or a slot of weight 0 that is written down."""
    assert batch.keys == [key for key, _, _ in intact.samples]
    assert batch.labels.tolist() == [label for _, _, label in intact.samples]
    assert {key for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True) if weight == 0} == lost
    assert {fault["key"] for fault in batch.faults} == lost
    assert len(batch.faults) == len(lost)
    assert all(fault["reason"] and fault["kind"] and fault["shard"] == "x.tar" for fault in batch.faults)
    for key, weight, mine, whole in zip(
        batch.keys, batch.weights.tolist(), batch.views[0], intact.whole.views[0], strict=True
    ):
        assert torch.equal(mine, whole if weight else torch.zeros_like(whole)), f"{key} has other pixels"


def check_accepted(folder: Path, mutation: fuzz.Mutation) -> None:
    """A tar that was taken, indexed and served: each image with its own label."""
    folder.mkdir()
    (folder / "x.tar").write_bytes(mutation.data)
    index_folder(folder, 1, show=False)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "x.index.npy", "x.tar"}
    images = Images(Manifest.load(folder))
    for number, (key, content, label) in enumerate(walked(mutation.data)):
        sample = images.load(0, number)
        assert (sample.key, sample.label) == (key, label)
        try:
            pixels: np.ndarray | None = decode(content)
        except DecodeError:
            pixels = None
        if pixels is None:
            assert sample.image is None
            assert sample.reason
        else:
            assert np.array_equal(sample.image, pixels)


def fuzz_tars(guarded: Path, form: str, count: int) -> None:
    intact = Intact(guarded / "set", form)
    accepted = 0
    for number in range(count):
        mutation = intact.tars.mutation(seed(), number)
        with bounded(mutation.name):
            taken = check_foreign(intact, mutation)
            check_packed(intact, mutation)
            if taken:
                accepted += 1
                if accepted % 10 == 0 and walked(mutation.data):
                    check_accepted(guarded / f"accepted{number}", mutation)
    assert count / 20 < accepted < count / 2, "the mutations are all too harmless or too harsh"
    intact.write(intact.data)
    check_served(intact, served(intact.images), set())
    assert {path.name for path in intact.folder.iterdir()} == {"manifest.json", "x.index.npy", "x.tar"}


def fuzz_manifests(guarded: Path, manifests: int, indices: int) -> None:
    """A set with a changed manifest or index, checksums made to fit or not: refused, or no image gets another's label.

    With an index that was changed and blessed, a label is what the index says.
    """
    intact = Intact(guarded / "set", "ustar")
    pixels = {key: torch.from_numpy(intact.pixels[key]).permute(2, 0, 1) for key, _, _ in intact.samples}
    labels = {key: label for key, _, label in intact.samples}
    path, text, index = intact.folder / "manifest.json", "", intact.index.read_bytes()
    text = path.read_text()
    cases = [(fuzz.manifest_mutation(text, seed(), number), False) for number in range(manifests)]
    cases += [(fuzz.index_mutation(index, seed(), number), True) for number in range(indices)]
    used = 0
    for number, (mutation, is_index) in enumerate(cases):
        intact.index.write_bytes(mutation.data if is_index else index)
        path.write_bytes(
            blessed(text, mutation.data) if is_index and number % 4 else (text.encode() if is_index else mutation.data)
        )
        with bounded(mutation.name):
            try:
                manifest = Manifest.load(intact.folder)
                batch = next(stream(intact.folder, batch=10).batches(0))
            except InputError as error:
                assert str(error)
            else:
                used += 1
                assert manifest.samples == 5
                for slot, key in enumerate(batch.keys):
                    if batch.weights[slot] and not is_index:
                        assert int(batch.labels[slot]) == labels[key]
                        if batch.views[0][slot].shape == pixels[key].shape:
                            assert torch.equal(batch.views[0][slot], pixels[key])
                assert {fault["position"] for fault in batch.faults} == set(
                    batch.positions[batch.weights == 0].tolist()
                )
            try:
                assert verify(Manifest.load(intact.folder), workers=1, show=False) is not None
            except InputError as error:
                assert str(error)
    assert used < len(cases) / 2
    assert {each.name for each in intact.folder.iterdir()} == {"manifest.json", "x.index.npy", "x.tar"}


def blessed(text: str, index: bytes) -> bytes:
    """The manifest with checksums that fit another index."""
    import hashlib
    import json

    content = json.loads(text)
    content["shards"][0]["index_sha256"] = hashlib.sha256(index).hexdigest()
    content["identity"] = fuzz.identity_of(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pkl.gz", "a.x.pyd.gz", "a.PKL.GZ", "a.pickle.gz.gz"])
def test_pickles_that_readers_would_open_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PENSTOCK_TRAP", str(tmp_path / "sprung"))
    content = fuzz.pickle.dumps(fuzz.Bomb())
    for _ in range(name.lower().count(".gz")):
        content = fuzz.gzip.compress(content)
    data = fuzz.joined([fuzz.member("a.png", png(pixels_of(0))), fuzz.member(name, content)])
    with pytest.raises(TarError, match="is a pickle"):
        read_records(data)
    if name in ("a.pkl", "a.pkl.gz"):  # the trap works
        with pytest.raises(AssertionError, match="a pickle was opened"):
            decode_all(data)


@pytest.mark.parametrize("form", FORMS)
def test_tars(guarded, form):
    fuzz_tars(guarded, form, TARS)


def test_manifests_and_indices(guarded):
    fuzz_manifests(guarded, MANIFESTS, INDICES)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_more_tars(guarded, form):
    fuzz_tars(guarded, form, rounds(TARS))


@pytest.mark.slow
def test_more_manifests_and_indices(guarded):
    fuzz_manifests(guarded, rounds(MANIFESTS), rounds(INDICES))
