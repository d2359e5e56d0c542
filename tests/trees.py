"""Small sets of images on disk, for tests of packing."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.pack import Packed, Request, pack
from penstock.streams.sets.sources import Options, open_source


def image_bytes(seed: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16), mode: str = "RGB") -> bytes:
    """A file with a blocky picture that no other seed has; `size` is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).convert(mode).save(file, kind)
    return file.getvalue()


def class_tree(root: Path, classes: int = 3, each: int = 7) -> Path:
    """root/class_i/image_j.jpg, every other image one folder deeper."""
    for label in range(classes):
        for number in range(each):
            folder = root / f"class_{label}" / ("deep" if number % 2 else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"image_{number}.jpg").write_bytes(image_bytes(label * 1000 + number))
    return root


def packed(source: Path | str, dest: Path, workers: int = 1, skip_bad: int = 0, **settings) -> Packed:
    """Pack with small shards; `settings` are those of `Request` and `Options`."""
    options = Options(**{name: settings.pop(name) for name in list(settings) if name in Options.__dataclass_fields__})
    request = Request(**({"shard_samples": 4} | settings))
    return pack(open_source(str(source), options), str(source), dest, request, workers, skip_bad, show=False)


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes] | tarfile.TarInfo], form: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar of (name, content) pairs, and of TarInfos without content, in that order."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def read_plainly(folder: Path) -> dict[str, dict]:
    """Samples by key, as webdataset itself reads the tars."""
    import webdataset

    urls = [str(folder / shard.name) for shard in Manifest.load(folder).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    found = {sample["__key__"]: sample for sample in samples}
    assert len(found) == len(samples)
    return found
