"""Manifest and index for tars that were made elsewhere, in place; the tars are only read."""

import hashlib
import json
from functools import partial
from pathlib import Path

from penstock.errors import InputError
from penstock.progress import progress
from penstock.streams.sets import jobs
from penstock.streams.sets.index import Indexed, collect, index_name, index_tar, read_records
from penstock.streams.sets.manifest import MANIFEST, PLAN, Manifest
from penstock.streams.sets.storage import LocalStorage, Storage, open_storage

NAMES_TEXT, NAMES_JSON = "classes.txt", "classes.json"


def index_folder(
    folder: Path | str, workers: int, show: bool = True, extra: tuple[str, ...] = ()
) -> tuple[Manifest, list[str]]:
    """Index every `.tar` in a folder, or at an address, in order of name, and write the manifest.

    Two of these at once are harmless: both write the same bytes, and every file appears whole.

    Args:
        extra: suffixes that are no image of the sample though they look like one, such as mask.png; when the folder
            was indexed before, those of that time go on to hold.

    Returns:
        The manifest, and the keys of images whose headers cannot be read ("shard: key").

    Raises:
        InputError: no tars, tars that readers would misread, tars that changed since they were indexed.
    """
    storage = open_storage(folder)
    if isinstance(storage, LocalStorage) and not storage.folder.is_dir():
        raise InputError(f"{folder} is not a folder; name one that holds .tar files")
    names = storage.names()
    if storage.sizes([PLAN]) != [None]:
        raise InputError(f"{folder} has an unfinished pack; run the same pack command again")
    packed = [name for name in names if name.endswith((".tgz", ".tar.gz", ".tar.zst", ".tar.bz2"))]
    if packed:
        raise InputError(f"{folder} holds {packed[0]}; compressed tars have no random access, so decompress them first")
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        raise InputError(f"{folder} holds no .tar files; to pack images, use `penstock shards pack`")
    old = Manifest.load(folder) if MANIFEST in names else None
    known = {} if old is None else {shard.name: shard.sha256 for shard in old.shards}
    if old is not None:
        extra = tuple(sorted({*old.extra, *extra}))
    try:
        with progress("indexing", len(tars), show=show) as meter:
            parts = jobs.run(_index_one, [(storage, tar, known.get(tar), extra) for tar in tars], workers, meter)
        classes = old.classes if old is not None else _classes_at(storage)
        made = dict(old.pack) if old is not None else {"kind": "indexed"}
        manifest = collect(storage, parts, classes, made | ({"extra": list(extra)} if extra else {}))
        if not manifest.samples:
            raise InputError(f"the tars in {folder} hold no samples")
        manifest.save()
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror} ({error.filename}); index files are written there") from None
    return manifest, [f"{part.shard.name}: {key}" for part in parts for key in part.unreadable]


def _index_one(
    storage: Storage, name: str, sha256: str | None, extra: tuple[str, ...], advance: jobs.Advance
) -> Indexed:
    with storage.copies([name]) as folder:
        if sha256 is not None:
            _refuse_changed(folder / name, sha256, f"{storage.shown}/{name}")
        index = folder / index_name(name)
        indexed = index_tar(folder / name, name, index, read=partial(read_records, extra=extra))
        if not isinstance(storage, LocalStorage):
            storage.write(index.name, index)
    advance(1)
    return indexed


def _classes_at(storage: Storage) -> tuple[str, ...] | None:
    with storage.copies([NAMES_TEXT, NAMES_JSON]) as folder:
        try:
            return class_names(folder)
        except InputError as error:
            raise InputError(str(error).replace(str(folder), str(storage.shown))) from None


def class_names(folder: Path) -> tuple[str, ...] | None:
    """Names by label from `classes.txt` or `classes.json`; None without either. Raises InputError for odd content."""
    text, data = folder / NAMES_TEXT, folder / NAMES_JSON
    try:
        if text.is_file():
            return tuple(line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip())
        if not data.is_file():
            return None
        content = json.loads(data.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"the class names in {folder} cannot be read: {error}") from None
    if isinstance(content, dict) and all(isinstance(value, int) for value in content.values()):
        content = {str(label): name for name, label in content.items()}  # numbers by name, as ImageFolder gives them
    if isinstance(content, dict) and sorted(content) == sorted(str(label) for label in range(len(content))):
        content = [content[str(label)] for label in range(len(content))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise InputError(f'{data} is neither a list of names, nor {{"0": name, ...}}, nor {{name: 0, ...}}')
    return tuple(content)


def _refuse_changed(tar: Path, sha256: str, shown: str) -> None:
    """An index made anew would bless damage, so shards must still be those of the manifest."""
    with tar.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise InputError(
                f"{shown} changed since {MANIFEST} was written; `penstock shards verify` tells what is damaged. "
                f"If the change is meant, delete {shown.rpartition('/')[0]}/{MANIFEST} and index again"
            )
