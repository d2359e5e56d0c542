"""Packed sets for tests, written by hand so that readers are tested against the format, not the packer."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from penstock.splitmix import splitmix64
from penstock.streams.sets.manifest import Manifest, Shard


def key_of(number: int) -> str:
    return f"sample{number:06d}"


def pixels_of(number: int, height: int = 8, width: int = 8) -> np.ndarray:
    """An image that tells its number: noise, with the number in the first pixel."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[0, 0] = (number % 256, number // 256 % 256, number // 65536)
    return pixels


def number_of(image: np.ndarray) -> int:
    """The inverse of `pixels_of`, for [C, H, W] or a batch of them."""
    corner = np.asarray(image)[..., :, 0, 0].astype(int)
    return corner @ [1, 256, 65536]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_set(
    folder: Path,
    shard_sizes: Sequence[int],
    content: Callable[[int], bytes] = lambda number: png(pixels_of(number)),
    label: Callable[[int], int] = lambda number: number % 10,
    suffix: str = "png",
    size: tuple[int, int] = (8, 8),
) -> Manifest:
    """A set of numbered samples, in order over the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number, digest, counts = [], 0, 0, {}
    for shard, samples in enumerate(shard_sizes):
        path, records = folder / f"shard-{shard:06d}.tar", []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(samples):
                key, data = key_of(number), content(number)
                identity = int.from_bytes(hashlib.blake2b(key.encode()).digest()[:8], "little")
                for name, payload in ((f"{key}.{suffix}", data), (f"{key}.cls", str(label(number)).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(payload)
                    if payload is data:
                        offset = tar.offset + 512
                    tar.addfile(member, io.BytesIO(payload))
                records.append(
                    (offset, len(data), zlib.crc32(data), identity, label(number), size[1], size[0], key.encode())
                )
                digest = (digest + splitmix64(identity)) % 2**64
                if label(number) >= 0:  # samples without label are not counted
                    counts[label(number)] = counts.get(label(number), 0) + 1
                number += 1
        kinds = [("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("id", "<u8"), ("label", "<i4")]
        kinds += [("width", "<u4"), ("height", "<u4"), ("key", "S12")]
        index = folder / f"shard-{shard:06d}.index.npy"
        np.save(index, np.array(records, dtype=kinds), allow_pickle=False)
        sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, index)]
        shards.append(Shard(path.name, path.stat().st_size, sums[0], samples, index.name, sums[1]))
    classes = tuple(f"class{number}" for number in range(max(counts, default=0) + 1))
    Manifest(tuple(shards), number, classes, counts, digest).save(folder)
    return Manifest.load(folder)


def damage(manifest: Manifest, number: int) -> str:
    """Flip a byte in the middle of a sample's image; returns the sample's key."""
    for shard in manifest.shards:
        index = np.load(manifest.root / shard.index, allow_pickle=False)
        if number < len(index):
            with (manifest.root / shard.name).open("r+b") as tar:
                place = int(index[number]["offset"]) + int(index[number]["size"]) // 2
                tar.seek(place)
                byte = tar.read(1)[0]
                tar.seek(place)
                tar.write(bytes([byte ^ 0x55]))
            return index[number]["key"].decode()
        number -= shard.samples
    raise IndexError(number)
