"""A tree of image files: one folder per class (torchvision's ImageFolder convention), or images alone."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from penstock.errors import InputError
from penstock.streams.decode import DecodeError
from penstock.streams.sets.encoded import is_image_name
from penstock.streams.sets.sources import Item

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Folder:
    """Labels are the places of the top folders in alphabetical order; images may lie deeper inside them.

    Images at the top alone, or `labels=False`, make a set without labels.

    Args:
        extra: suffixes of files that go with the image of the same name: photo.txt and photo.mask.png with photo.jpg.
    """

    def __init__(self, root: Path, labels: bool = True, extra: tuple[str, ...] = ()):
        if not root.is_dir():
            raise InputError(f"{root} is not a folder; name one that holds images, or folders of images per class")
        self.root, self.extra = root, extra
        top = sorted((entry for entry in os.scandir(root) if entry.name[0] != "."), key=lambda entry: entry.name)
        folders = [entry.name for entry in top if entry.is_dir()]
        files = [entry.name for entry in top if entry.is_file() and self._is_image(entry.name)]
        splits = [name for name in folders if name.lower() in SPLITS]
        if labels and splits:
            raise InputError(
                f"{root} holds splits, not classes ({', '.join(splits)}); add --split {splits[0]} to pack one of them, "
                "and pack the others into folders of their own"
            )
        if labels and folders and files:
            raise InputError(
                f"{root} holds both folders and images ({files[0]}), so classes cannot be told; move one of them, or "
                "add --no-labels to pack all images alone"
            )
        self.classes = tuple(folders) if labels and folders else None
        self._left_out: Counter[str] = Counter()
        self._empty: list[str] = []
        self._beside: dict[str, str] = {}  # files that may go with an image, by name in small letters, until one does
        self._alone: list[str] = []  # those that go with none

    def items(self) -> tuple[list[Item], list[int]]:
        found = []
        if self.classes is None:
            names = list(self._images(self.root, ""))
            found = [self._item(name, -1) for name in names]
        else:
            for label, folder in enumerate(self.classes):
                names = list(self._images(self.root / folder, f"{folder}/"))
                found += [self._item(name, label) for name in names]
                if not names:
                    self._empty.append(folder)
        if not found:
            others = f" ({self._others()})" if self._left_out else ""
            raise InputError(f"{self.root} holds no images{others}; is this the right folder?")
        used = {name for item in found for _, name in item.place[2:]}
        self._alone = sorted(set(self._beside.values()) - used)
        self._beside = {}  # it would be sent to every process that packs
        return found, [1] * len(found)

    def read(self, item: Item) -> tuple[bytes, int]:
        name, label = item.place[:2]
        return self._content(name), label

    def beside(self, item: Item) -> dict[str, bytes]:
        """As of `WithExtras`."""
        return {suffix: self._content(name) for suffix, name in item.place[2:]}

    def _content(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise DecodeError(f"{name}: {error.strerror}") from None

    def _item(self, name: str, label: int) -> Item:
        """With (suffix, name) of its files in its place, so that a pack knows when there are others."""
        stem = name.rpartition(".")[0].lower()
        files = ((suffix, self._beside.get(f"{stem}.{suffix}")) for suffix in self.extra)
        return Item(name, (name, label, *((suffix, file) for suffix, file in files if file is not None)))

    def _is_beside(self, name: str) -> bool:
        return name.lower().endswith(tuple(f".{suffix}" for suffix in self.extra))

    def _is_image(self, name: str) -> bool:
        return is_image_name(name) and not self._is_beside(name)

    def remarks(self) -> list[str]:
        said = []
        if self._left_out:
            said.append(f"left out as no images: {self._others()}")
        if self._alone:
            said.append(f"left out, as there is no image of their name: {len(self._alone)} files, as {self._alone[0]}")
        if self._empty:
            said.append(f"classes without images, kept so that labels keep their numbers: {', '.join(self._empty)}")
        return said

    def _images(self, folder: Path, prefix: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
        """Paths relative to the root, sorted; hidden files are not looked at."""
        real = os.path.realpath(folder)
        if real in above:
            raise InputError(f"{folder} is a link to a folder around itself; remove it")
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from self._images(folder / entry.name, f"{prefix}{entry.name}/", above | {real})
            elif self._is_image(entry.name):
                yield prefix + entry.name
            elif self._is_beside(entry.name):
                self._beside[f"{prefix}{entry.name}".lower()] = prefix + entry.name
            else:
                self._left_out[Path(entry.name).suffix or "no extension"] += 1

    def _others(self) -> str:
        return ", ".join(f"{count} files {kind}" for kind, count in self._left_out.most_common(5))
