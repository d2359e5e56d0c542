"""Any torchvision classification dataset."""

import contextlib
import inspect
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from penstock.errors import InputError, nearest
from penstock.streams.decode import DecodeError
from penstock.streams.sets.encoded import encode_png
from penstock.streams.sets.sources import Item


class Torchvision:
    """Datasets that keep files (DatasetFolder) are packed as those files; others, as they give pixels, as PNG."""

    def __init__(self, name: str, split: str | None, root: Path, download: bool, labels: bool = True):
        import torchvision

        known = [key for key, value in vars(torchvision.datasets).items() if inspect.isclass(value)]
        if name not in known:
            raise InputError(f"torchvision has no dataset {name!r}{nearest(name, known)}")
        self.name, self.split, self.root, self.labels = name, split, str(root.resolve()), labels
        if download:
            _build(name, split, self.root, True)
        names: Any = getattr(self._dataset(), "classes", None)
        self.classes = None
        if labels and names:
            self.classes = tuple(", ".join(each) if isinstance(each, tuple) else str(each) for each in names)

    def items(self) -> tuple[list[Item], list[int]]:
        count = len(self._dataset())
        return [Item(f"{self.name}/{number}", (number,)) for number in range(count)], [1] * count

    def read(self, item: Item) -> tuple[bytes, int]:
        dataset = self._dataset()
        (number,) = item.place
        if hasattr(dataset, "samples") and hasattr(dataset, "loader"):
            path, target = dataset.samples[number]
            return Path(path).read_bytes(), self._label(target)
        try:
            image, target = dataset[number]
        except Exception as error:  # each dataset raises its own
            raise DecodeError(f"{type(error).__name__}: {error}") from None
        if not isinstance(image, Image.Image):
            raise InputError(f"torchvision's {self.name} does not give pictures but {type(image).__name__}")
        return encode_png(image), self._label(target)

    def remarks(self) -> list[str]:
        return []

    def _label(self, target: Any) -> int:
        if not self.labels:
            return -1
        if isinstance(target, (int, np.integer)):
            return int(target)
        raise InputError(f"torchvision's {self.name} has no class numbers; add --no-labels to pack its images alone")

    def _dataset(self) -> Any:
        return _build(self.name, self.split, self.root, False)


@lru_cache(maxsize=1)
def _build(name: str, split: str | None, root: str, download: bool) -> Any:
    import torchvision

    kind = getattr(torchvision.datasets, name)
    accepted = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": root} if "root" in accepted else {}
    if "download" in accepted:
        options["download"] = download
    if split and "split" in accepted:
        options["split"] = split
    elif split and "train" in accepted:
        if split not in ("train", "test"):
            raise InputError(f"torchvision's {name} has the splits train and test, not {split!r}")
        options["train"] = split == "train"
    elif split:
        raise InputError(f"torchvision's {name} has no splits; leave {split!r} out")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Files already downloaded and verified"
            return kind(**options)
    except Exception as error:
        raise InputError(
            f"torchvision's {name} cannot be opened in {root} ({error}); give its place with --root, or add --download"
        ) from None
