"""Parquet files with encoded images, as Hugging Face datasets store them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from penstock.errors import InputError, nearest
from penstock.streams.decode import DecodeError
from penstock.streams.sets.sources import Item

RUN = 1000  # rows of a row group that stay together, so that packing a shard does not read every file
IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "bytes")
LABEL_NAMES = ("label", "labels", "cls", "target")


class Parquet:
    """The image column is binary or a struct with `bytes`; the label column is of integers.

    Columns are found by type and usual name, and can be given. Class names come from Hugging Face's metadata.
    """

    def __init__(self, path: Path, split: str | None, image: str | None, label: str | None, labels: bool = True):
        self.files = [str(file) for file in _files(path, split)]
        self.path = path
        schema = _open(self.files[0]).schema_arrow
        for file in self.files[1:]:
            if not _open(file).schema_arrow.equals(schema):
                raise InputError(f"{file} has other columns than {self.files[0]}; pack them one by one")
        self.image = self._image_column(schema, image)
        features = _features(schema)
        self.label = self._label_column(schema, label, features) if labels else None
        names = features.get(self.label, {}).get("names") if self.label else None
        self.classes = tuple(map(str, names)) if names else None

    def items(self) -> tuple[list[Item], list[int]]:
        found, runs = [], []
        for number, file in enumerate(self.files):
            metadata = _open(file).metadata
            stem = Path(file).stem
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                found += [Item(f"{stem}/{group}/{row}", (number, group, row)) for row in range(rows)]
                runs += [min(RUN, rows - start) for start in range(0, rows, RUN)]
        if not found:
            raise InputError(f"{self.path} has no rows")
        return found, runs

    def read(self, item: Item) -> tuple[bytes, int]:
        file, group, row = item.place
        images, labels = _row_group(self.files[file], group, self.image, self.label)
        value = images[row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if value is None:
            raise DecodeError("the row holds no image bytes")
        label = labels[row].as_py() if labels is not None else None
        return value, -1 if label is None else label

    def remarks(self) -> list[str]:
        label = f"labels from {self.label!r}" if self.label else "no labels"
        return [f"images from column {self.image!r}, {label}"]

    def _image_column(self, schema: Any, wanted: str | None) -> str:
        fitting = [field.name for field in schema if _holds_bytes(field.type)]
        if wanted is not None and wanted not in fitting:
            raise InputError(f"{self.path} has no image column {wanted!r}{nearest(wanted, fitting)}")
        usual = [name for name in IMAGE_NAMES if name in fitting]
        if wanted or usual or len(fitting) == 1:
            return wanted or (usual or fitting)[0]
        what = f"several columns of bytes ({', '.join(fitting)})" if fitting else "no column of bytes"
        raise InputError(f"{self.path} has {what}; name the images' with --image-column")

    def _label_column(self, schema: Any, wanted: str | None, features: dict[str, Any]) -> str | None:
        import pyarrow.types

        fitting = [field.name for field in schema if pyarrow.types.is_integer(field.type)]
        if wanted is not None:
            if wanted not in fitting:
                raise InputError(
                    f"{self.path} has no column of class numbers called {wanted!r}{nearest(wanted, fitting)}"
                )
            return wanted
        usual = [name for name in LABEL_NAMES if name in schema.names]
        if usual and usual[0] not in fitting:
            raise InputError(
                f"{self.path}: column {usual[0]!r} does not hold class numbers but {schema.field(usual[0]).type}; name "
                "another with --label-column, or add --no-labels"
            )
        if usual:
            return usual[0]
        declared = [name for name in fitting if features.get(name, {}).get("_type") == "ClassLabel"]
        if len(declared) > 1:
            raise InputError(
                f"{self.path} has several columns of labels ({', '.join(declared)}); name one with --label-column"
            )
        return declared[0] if declared else None


def _files(path: Path, split: str | None) -> list[Path]:
    """The files of a split: `train-*.parquet`, or those below a folder called `train`; all without a split."""
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.parquet"))
    if split is None:
        splits = sorted({file.name.split("-")[0] for file in found} & {"train", "validation", "test"})
        if len(splits) > 1:
            raise InputError(f"{path} holds the splits {', '.join(splits)}; add --split to pack one of them")
        return found
    chosen = [
        file
        for file in found
        if file.stem == split or file.name.startswith(f"{split}-") or split in file.relative_to(path).parts[:-1]
    ]
    if not chosen:
        raise InputError(f"{path} has no Parquet files of a split {split!r}; it has {found[0].relative_to(path)}, ...")
    return chosen


def _open(file: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file} cannot be read as Parquet: {error}") from None


@lru_cache(maxsize=1)
def _row_group(file: str, group: int, image: str, label: str | None) -> tuple[Any, Any]:
    """The image and label columns of a row group; items come run by run, so the last one is the one to keep."""
    table = _open(file).read_row_group(group, columns=[image, *([label] if label else [])])
    return table.column(image), table.column(label) if label else None


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's description of the columns, which it keeps in the schema's metadata."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
