"""scikit-learn's handwritten digits: 1,797 images that come with the library, so demos need no download."""

import numpy as np
from PIL import Image

from penstock.errors import InputError, nearest
from penstock.splitmix import permutation
from penstock.streams.sets.encoded import encode_png
from penstock.streams.sets.sources import Item

TRAIN_SHARE = 0.8


class Digits:
    """8 x 8 grey images, enlarged bilinearly to `size` x `size` and stored as RGB PNG.

    The split is fixed: of every class a keyed four fifths train, the rest test.
    """

    def __init__(self, split: str, size: int = 16, labels: bool = True):
        if split not in ("train", "test"):
            raise InputError(f"digits has no split {split!r}{nearest(split, ['train', 'test'])}")
        if not 1 <= size <= 1024:
            raise InputError(f"--size {size} is not a useful side for digits; give 8 to 1024")
        self.split, self.size, self.labels = split, size, labels
        self.classes = tuple(str(digit) for digit in range(10)) if labels else None

    def items(self) -> tuple[list[Item], list[int]]:
        targets = _digits()[1]
        chosen: list[int] = []
        for digit in range(10):
            members = np.flatnonzero(targets == digit)[permutation(int((targets == digit).sum()), digit)]
            cut = round(TRAIN_SHARE * len(members))
            chosen += (members[:cut] if self.split == "train" else members[cut:]).tolist()
        found = [Item(f"{targets[number]}/{number:04d}", (number,)) for number in sorted(chosen)]
        return found, [1] * len(found)

    def read(self, item: Item) -> tuple[bytes, int]:
        images, targets = _digits()
        (number,) = item.place
        grey = np.round(images[number] * (255 / 16)).astype(np.uint8)  # values are 0 to 16
        image = Image.fromarray(grey).resize((self.size, self.size), Image.Resampling.BILINEAR).convert("RGB")
        return encode_png(image), int(targets[number]) if self.labels else -1

    def remarks(self) -> list[str]:
        return []


_CACHE: list[tuple[np.ndarray, np.ndarray]] = []


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] in 0..16 and targets [1797], loaded once a process."""
    if not _CACHE:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        _CACHE.append((bunch.images, bunch.target))
    return _CACHE[0]
