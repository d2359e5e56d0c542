"""Where images to be packed come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from penstock.errors import InputError


class Item(NamedTuple):
    """One image before it is read: a name for people and keys, and where the source finds it again."""

    name: str
    place: tuple[Any, ...]


class Source(Protocol):
    """Images with optional labels. It is pickled into the processes that pack, so it holds no open files."""

    classes: tuple[str, ...] | None

    def items(self) -> tuple[list[Item], list[int]]:
        """All images in a fixed order, and lengths of runs of them that are cheap to read together."""

    def read(self, item: Item) -> tuple[bytes, int]:
        """An image file's bytes and its label (-1: none). Raises DecodeError when there are no bytes to be had."""

    def remarks(self) -> list[str]:
        """What people should know of the source: files left out, empty classes."""


@runtime_checkable
class WithExtras(Source, Protocol):
    """A source whose images may have other files beside them: captions, boxes, masks."""

    extra: tuple[str, ...]  # their suffixes

    def beside(self, item: Item) -> dict[str, bytes]:
        """The content of these files by suffix, of those that an image has. Raises DecodeError where one is unread."""


@dataclass(frozen=True)
class Options:
    """Settings of sources; those that a source does not know must stay at their defaults."""

    split: str | None = None
    root: Path = Path("data")  # torchvision: where its datasets lie
    download: bool = False  # torchvision
    size: int = 16  # digits: side in pixels
    image_column: str | None = None  # parquet
    label_column: str | None = None  # parquet
    labels: bool = True  # False packs images alone
    extra: tuple[str, ...] = ()  # folder: suffixes of files beside each image that go with it


def open_source(address: str, options: Options) -> Source:
    """The source that `address` names: `digits`, `torchvision:NAME`, a Parquet file or folder, or a folder of images.

    `digits:test` and `torchvision:NAME:test` are short for a split. Raises InputError.
    """
    if options.extra and not Path(address).is_dir():
        raise InputError(f"--extra takes files that lie beside images, and {address} is no folder of images; remove it")
    kind, _, rest = address.partition(":")
    if kind == "digits":
        from penstock.streams.sets.sources.digits import Digits

        return Digits(_split(rest, options, address) or "train", options.size, options.labels)
    if kind == "torchvision":
        from penstock.streams.sets.sources.torchvision import Torchvision

        name, _, split = rest.partition(":")
        return Torchvision(name, _split(split, options, address), options.root, options.download, options.labels)
    path = Path(address)
    if not path.exists():
        raise InputError(
            f"{address} does not exist; SOURCE is a folder of images, a Parquet file or folder, torchvision:NAME, "
            "or digits"
        )
    if path.suffix == ".parquet" or (path.is_dir() and next(path.rglob("*.parquet"), None) is not None):
        from penstock.streams.sets.sources.parquet import Parquet

        if options.extra:
            raise InputError(
                f"--extra takes files that lie beside images, and {address} holds Parquet files; remove it"
            )
        return Parquet(path, options.split, options.image_column, options.label_column, options.labels)
    if not path.is_dir():
        raise InputError(f"{address} is a single file; SOURCE is a folder of images or a Parquet file")
    from penstock.streams.sets.sources.folder import Folder

    return Folder(path / options.split if options.split else path, options.labels, options.extra)


def _split(short: str, options: Options, address: str) -> str | None:
    if short and options.split and short != options.split:
        raise InputError(f"{address} and --split {options.split} disagree; give one of them")
    return short or options.split
