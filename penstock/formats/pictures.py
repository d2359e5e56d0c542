"""Images as `penstock predict` is given them: files, folders and packed sets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.errors import InputError
from penstock.streams.decode import DecodeError, decode
from penstock.streams.images import Images
from penstock.streams.sets.encoded import is_image_name
from penstock.streams.sets.manifest import MANIFEST, Manifest


@dataclass(frozen=True)
class Picture:
    """An image, or the reason why it cannot be read."""

    name: str  # its path, or SET/KEY
    pixels: np.ndarray | None  # uint8 [H, W, C]
    reason: str = ""


def pictures(places: Sequence[Path | str], channels: int) -> Iterator[Picture]:
    """The images of all places, one after another; those of a folder, and of the folders in it, by name.

    Raises:
        InputError: a place does not exist, or holds no image. Told before the first image is read.
    """
    sources = [_source(place) for place in places]
    for source in sources:
        yield from (
            _of_set(source, channels) if isinstance(source, Manifest) else (_of_file(f, channels) for f in source)
        )


def _source(place: Path | str) -> Manifest | list[Path]:
    if isinstance(place, str):
        return Manifest.load(place)
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputError(f"{place} does not exist; give image files, folders of them, or packed sets")
    if (place / MANIFEST).is_file():
        return Manifest.load(place)
    hidden = [part for part in place.rglob("*") if part.is_file() and is_image_name(part.name)]
    found = sorted(file for file in hidden if not any(p.startswith(".") for p in file.relative_to(place).parts))
    if not found:
        raise InputError(
            f"{place} holds no image and is no packed set; give image files, folders of them, or packed sets"
        )
    return found


def _of_file(file: Path, channels: int) -> Picture:
    try:
        return Picture(str(file), decode(file.read_bytes(), channels))
    except OSError as error:
        return Picture(str(file), None, str(error.strerror))
    except DecodeError as error:
        return Picture(str(file), None, str(error))


def _of_set(manifest: Manifest, channels: int) -> Iterator[Picture]:
    images = Images(manifest, channels)
    for shard, part in enumerate(manifest.shards):
        for number in range(part.samples):
            sample = images.load(shard, number)
            yield Picture(f"{manifest.root}/{sample.key}", sample.image, sample.reason)
