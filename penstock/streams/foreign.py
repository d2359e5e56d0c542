"""Manifest and index for tars that were made elsewhere, in place; the tars are only read."""

import hashlib
import json
from functools import partial
from pathlib import Path

from penstock.errors import InputError
from penstock.progress import progress
from penstock.streams import jobs
from penstock.streams.index import Indexed, collect, index_name, index_tar, read_records
from penstock.streams.manifest import MANIFEST, PLAN, Manifest

NAMES_TEXT, NAMES_JSON = "classes.txt", "classes.json"


def index_folder(
    folder: Path, workers: int, show: bool = True, extra: tuple[str, ...] = ()
) -> tuple[Manifest, list[str]]:
    """Index every `.tar` in `folder`, in order of name, and write the manifest.

    Two of these at once are harmless: both write the same bytes, and every file appears whole.

    Args:
        extra: suffixes that are no image of the sample though they look like one, such as mask.png; when the folder
            was indexed before, those of that time go on to hold.

    Returns:
        The manifest, and the keys of images whose headers cannot be read ("shard: key").

    Raises:
        InputError: no tars, tars that readers would misread, tars that changed since they were indexed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name one that holds .tar files")
    if (folder / PLAN).is_file():
        raise InputError(f"{folder} has an unfinished pack; run the same pack command again")
    packed = [path.name for path in folder.iterdir() if path.name.endswith((".tgz", ".tar.gz", ".tar.zst", ".tar.bz2"))]
    if packed:
        raise InputError(f"{folder} holds {packed[0]}; compressed tars have no random access, so decompress them first")
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise InputError(f"{folder} holds no .tar files; to pack images, use `penstock shards pack`")
    old = Manifest.load(folder) if (folder / MANIFEST).is_file() else None
    if old is not None:
        _refuse_changed(old, tars)
        extra = tuple(sorted({*old.extra, *extra}))
    try:
        with progress("indexing", len(tars), show=show) as meter:
            parts = jobs.run(_index_one, [(tar, extra) for tar in tars], workers, meter)
        classes = old.classes if old is not None else class_names(folder)
        made = dict(old.pack) if old is not None else {"kind": "indexed"}
        manifest = collect(folder, parts, classes, made | ({"extra": list(extra)} if extra else {}))
        if not manifest.samples:
            raise InputError(f"the tars in {folder} hold no samples")
        manifest.save(folder)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror} ({error.filename}); index files are written there") from None
    return manifest, [f"{part.shard.name}: {key}" for part in parts for key in part.unreadable]


def _index_one(tar: Path, extra: tuple[str, ...], advance: jobs.Advance) -> Indexed:
    indexed = index_tar(tar, tar.name, tar.with_name(index_name(tar.name)), read=partial(read_records, extra=extra))
    advance(1)
    return indexed


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


def _refuse_changed(old: Manifest, tars: list[Path]) -> None:
    """An index made anew would bless damage, so shards must still be those of the manifest."""
    known = {shard.name: shard.sha256 for shard in old.shards}
    for tar in tars:
        if tar.name in known:
            with tar.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != known[tar.name]:
                    raise InputError(
                        f"{tar} changed since {MANIFEST} was written; `penstock shards verify` tells what is damaged. "
                        f"If the change is meant, delete {old.root}/{MANIFEST} and index again"
                    )
