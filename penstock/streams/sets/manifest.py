"""The manifest of a shard set: what it holds, with checksums. Imports no torch, so checks stay quick.

A set is a folder, or an address of an object store, with `manifest.json`, tars, and an index beside each tar (see
`penstock.streams.sets.index`).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from penstock.errors import InputError
from penstock.streams.sets.storage import Fault, LocalStorage, Storage, open_storage

MANIFEST = "manifest.json"
PLAN = ".pack-plan.json"  # written first and removed last by `penstock.streams.sets.pack`
VERSION = 1
PLAIN_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
SHA256 = re.compile("[0-9a-f]{64}")
REMEDY = "; make it with `penstock shards pack SOURCE DEST`, or `penstock shards index FOLDER` for tars made elsewhere"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar and its index, by names relative to the manifest; sizes in bytes, sums in hexadecimal."""

    name: str
    bytes: int
    sha256: str
    samples: int
    index: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; `pack` only records how it was made and is no part of the identity."""

    shards: tuple[Shard, ...]
    samples: int
    classes: tuple[str, ...] | None  # names, by label
    class_counts: Mapping[int, int]  # samples of each label; unlabelled samples are not in it
    digest_of_ids: int  # sum of splitmix64(id) over samples, modulo 2^64
    pack: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION
    storage: Storage = field(default_factory=lambda: LocalStorage(Path()), compare=False, repr=False)

    _recent: ClassVar[dict[tuple[str, bytes], "Manifest"]] = {}  # a run opens its sets several times

    @property
    def root(self) -> Path | str:
        """Where the set lies, for people; a Path where that is a folder."""
        return self.storage.shown

    @classmethod
    def load(cls, address: str | Path, remote: Any = None) -> "Manifest":
        """Read and check `manifest.json`. Raises InputError when it is absent, damaged or unsafe.

        Args:
            remote: how to read an object store (penstock.streams.sets.remote.options.Remote); None takes the defaults.
        """
        return cls.at(open_storage(address, remote))

    @classmethod
    def inside(cls, place: str | Path, name: str) -> "Manifest":
        """The set at a place, or the one called `name` below it. Raises InputError where there is none with samples."""
        deeper = f"{str(place).rstrip('/')}/{name}"
        here, below = (open_storage(each).sizes([MANIFEST])[0] is not None for each in (place, deeper))
        manifest = cls.load(deeper if below and not here else place)
        if manifest.samples == 0:
            raise InputError(f"{manifest.root} holds no sample")
        return manifest

    @classmethod
    def at(cls, storage: Storage) -> "Manifest":
        """`load` of a set whose storage is open."""
        try:
            raw = storage.content(MANIFEST)
        except FileNotFoundError:
            raise InputError(f"{storage.shown} {_instead(storage)}{REMEDY}") from None
        except (OSError, Fault) as error:
            raise InputError(f"{storage.shown}/{MANIFEST} cannot be read: {error}{REMEDY}") from None
        known = storage.key, hashlib.sha256(raw).digest()
        if known not in cls._recent:
            try:
                text = raw.decode("utf-8")
                del raw  # here and below: of a set of many shards each copy is large
                content = json.loads(text)
                del text
            except (ValueError, RecursionError) as error:
                raise InputError(f"{storage.shown}/{MANIFEST} cannot be read: {error}{REMEDY}") from None
            manifest = cls._of(storage, content)
            while len(cls._recent) >= 4:
                cls._recent.pop(next(iter(cls._recent)))
            storage.expect(sum(shard.bytes for shard in manifest.shards))
            cls._recent[known] = manifest
        return cls._recent[known]

    @classmethod
    def _of(cls, storage: Storage, content: Any) -> "Manifest":
        path = f"{storage.shown}/{MANIFEST}"
        if isinstance(content, dict) and content.get("version", VERSION) != VERSION:
            raise InputError(f"{path} has version {content['version']}; this Penstock reads version {VERSION}")
        try:
            manifest = cls(
                shards=tuple(Shard(**shard) for shard in content.pop("shards")),
                samples=content["samples"],
                classes=None if content["classes"] is None else tuple(content["classes"]),
                class_counts={int(label): count for label, count in content["class_counts"].items()},
                digest_of_ids=int(content["digest_of_ids"], 16),
                pack=content["pack"],
                storage=storage,
            )
            intact = manifest.identity == content["identity"]
            wrong = manifest._wrong()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is not a manifest ({type(error).__name__}: {error}){REMEDY}") from None
        if not intact:
            raise InputError(f"{path} was changed after it was written: its content does not match its own checksum")
        for shard in manifest.shards:
            for name in (shard.name, shard.index):
                if not safe_name(name):
                    raise InputError(f"{path} names {name!r}, outside its folder; such a manifest is not used")
        if wrong:
            raise InputError(f"{path} is not a manifest: {wrong}{REMEDY}")
        return manifest

    def save(self, folder: str | Path | None = None) -> None:
        """Write `manifest.json` atomically: where the set lies, or into another folder."""
        content = self._content() | {"pack": dict(self.pack), "identity": self.identity}
        storage = self.storage if folder is None else LocalStorage(Path(folder))
        storage.write(MANIFEST, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    @cached_property
    def identity(self) -> str:
        """SHA-256 in hexadecimal of all that defines the data."""
        head, tail = _canonical(self._about() | {"shards": []}).split('"shards":[]')
        digest = hashlib.sha256(f'{head}"shards":['.encode())
        for first in range(0, len(self.shards), 1000):  # in parts: one text of them all would be large
            listed = _canonical([_listed(shard) for shard in self.shards[first : first + 1000]])
            digest.update(("," * (first > 0) + listed[1:-1]).encode())
        digest.update(f"]{tail}".encode())
        return digest.hexdigest()

    def _wrong(self) -> str:
        """What cannot be in a manifest that fits its checksum; empty when all is well."""
        for shard in self.shards:
            if not (_count(shard.samples) and _count(shard.bytes)):
                return f"{shard.name} has {shard.samples!r} samples in {shard.bytes!r} bytes"
            if not (SHA256.fullmatch(shard.sha256) and SHA256.fullmatch(shard.index_sha256)):
                return f"the checksums of {shard.name} are no SHA-256"
        files = {name for shard in self.shards for name in (shard.name, shard.index)}
        if len(files) < 2 * len(self.shards):
            return "a file is named twice"
        if not _count(self.samples) or self.samples != sum(shard.samples for shard in self.shards):
            return f"it counts {self.samples!r} samples, and its shards {sum(shard.samples for shard in self.shards)}"
        if self.samples == 0:
            return "it holds no sample"
        if self.classes is not None and not all(isinstance(name, str) for name in self.classes):
            return "class names are text"
        if not all(label >= 0 and _count(count) for label, count in self.class_counts.items()) or self.unlabelled < 0:
            return "its classes are counted wrongly"
        if self.classes is not None and (largest := max(self.class_counts, default=-1)) >= len(self.classes):
            return f"it counts samples of label {largest}, and names {len(self.classes)} classes"
        if not 0 <= self.digest_of_ids < 1 << 64:
            return "its digest is no number of 64 bits"
        if not isinstance(self.pack, dict) or not isinstance(self.pack.get("settings", {}), dict):
            return "`pack` does not say how it was packed"
        extra = self.pack.get("extra", [])
        if not isinstance(extra, list | tuple) or not all(isinstance(suffix, str) for suffix in extra):
            return "`extra` of `pack` is no list of suffixes"
        return ""

    def _content(self) -> dict[str, Any]:
        return self._about() | {"shards": [_listed(shard) for shard in self.shards]}

    def _about(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "samples": self.samples,
            "classes": None if self.classes is None else list(self.classes),
            "class_counts": {str(label): count for label, count in sorted(self.class_counts.items())},
            "digest_of_ids": f"{self.digest_of_ids:016x}",  # text: readers in other languages lose bits above 2^53
        }

    @property
    def extra(self) -> tuple[str, ...]:
        """Suffixes that are no image of a sample though they may look like one."""
        return tuple(self.pack.get("extra", ()))

    @property
    def unlabelled(self) -> int:
        return self.samples - sum(self.class_counts.values())

    def class_name(self, label: int) -> str:
        """A label's name for people; its number where names are unknown."""
        if label < 0:
            return "(no label)"
        return self.classes[label] if self.classes and label < len(self.classes) else str(label)

    def check_files(self) -> None:
        """Raise InputError naming every shard or index that is missing or has another size; reads no content.

        Of a set with very many shards, those in between are only checked when they are opened.
        """
        wrong = []
        shards = self.shards[:: -(-len(self.shards) // self.storage.shards_looked_at) or 1]
        sizes = self.storage.sizes([name for shard in shards for name in (shard.name, shard.index)])
        for shard, size, index in zip(shards, sizes[::2], sizes[1::2], strict=True):
            if size is None:
                wrong.append(f"{shard.name} is missing")
            elif size != shard.bytes:
                wrong.append(f"{shard.name} has {size:,} bytes instead of {shard.bytes:,}")
            if index is None:
                wrong.append(f"{shard.index} is missing")
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise InputError(
                f"{self.root} does not hold what its manifest says: {'; '.join(wrong[:10])}{more}. "
                f"Copy the files again, or see `penstock shards verify {self.root}`"
            )

    def diff(self, other: "Manifest") -> list[str]:
        """What differs from `other`, in words for people; empty when both describe the same data."""
        words = []
        if self.samples != other.samples:
            words.append(f"{self.samples:,} samples instead of {other.samples:,}")
        if self.classes != other.classes:
            words.append(f"classes {_brief(self.classes)} instead of {_brief(other.classes)}")
        for label in sorted({*self.class_counts, *other.class_counts}):
            mine, theirs = self.class_counts.get(label, 0), other.class_counts.get(label, 0)
            if mine != theirs:
                words.append(f"{mine:,} samples of class {self.class_name(label)} instead of {theirs:,}")
        if self.samples == other.samples and self.digest_of_ids != other.digest_of_ids:
            words.append("other sample keys")
        mine_by_name = {shard.name: shard for shard in self.shards}
        theirs_by_name = {shard.name: shard for shard in other.shards}
        words += [f"shard {name} is new" for name in mine_by_name if name not in theirs_by_name]
        words += [f"shard {name} is gone" for name in theirs_by_name if name not in mine_by_name]
        for name, shard in mine_by_name.items():
            if name in theirs_by_name and shard != theirs_by_name[name]:
                words.append(f"shard {name} has other content")
        if not words and self.shards != other.shards:
            words.append("the shards come in another order")
        return words


def _listed(shard: Shard) -> dict[str, Any]:
    return {
        "name": shard.name,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "samples": shard.samples,
        "index": shard.index,
        "index_sha256": shard.index_sha256,
    }


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def safe_name(name: Any) -> bool:
    """Whether a file name of a manifest or tar stays inside its folder and cannot be taken for an address."""
    if isinstance(name, str) and PLAIN_NAME.fullmatch(name):
        return True
    path = PurePosixPath(str(name))
    return (
        isinstance(name, str)
        and bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and not re.search(r"[\x00-\x1f\\]|^[a-z]+:", name)
    )


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0  # JSON's true is an int to Python


def _instead(storage: Storage) -> str:
    """What is there in place of a manifest."""
    if isinstance(storage, LocalStorage) and not storage.folder.is_dir():
        return "is not a folder"
    if storage.sizes([PLAN]) != [None]:
        return "has an unfinished pack (run the same pack command again)"
    return "has no manifest"


def _brief(classes: tuple[str, ...] | None) -> str:
    if classes is None:
        return "without names"
    shown = ", ".join(classes[:5])
    return f"({shown}, ... {len(classes)} in all)" if len(classes) > 5 else f"({shown})"
