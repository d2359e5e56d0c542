"""What a set holds, in words and numbers."""

from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table

from penstock.streams.sets.index import EXTRA, load_records
from penstock.streams.sets.manifest import Manifest

MOST_CLASSES = 40  # rows of the table of classes


def print_summary(manifest: Manifest) -> None:
    """Counts, sizes and classes on standard output."""
    console = Console(markup=False, highlight=False)
    parts = [manifest.storage.local(shard.index, shard.index_sha256, load_records) for shard in manifest.shards]
    sizes = {name: np.concatenate([part[name] for part in parts]) for name in ("width", "height", "size")}
    table = Table(show_header=False, title=str(manifest.root))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("samples", f"{manifest.samples:,}")
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("bytes", f"{sum(shard.bytes for shard in manifest.shards):,}")
    table.add_row("classes", f"{len(manifest.classes):,}" if manifest.classes else "without names")
    table.add_row("unlabelled", f"{manifest.unlabelled:,}")
    for name in ("width", "height", "size"):
        unit = "bytes an image" if name == "size" else f"{name}, pixels"
        table.add_row(unit, _spread(sizes[name]))
    unknown = int((sizes["width"] == 0).sum())
    if unknown:
        table.add_row("headers not readable", f"{unknown:,}")
    for suffix, count in _members(parts).items():
        table.add_row(f"with {suffix}", f"{count:,}")
    table.add_row("made from", str(manifest.pack.get("source", "tars made elsewhere")))
    settings = manifest.pack.get("settings", {})
    if "short_side" in settings:
        said = f"JPEG of short side {settings['short_side']}, quality {settings.get('quality', 'unknown')}"
        table.add_row("larger images", f"re-encoded: {said}")
    table.add_row("identity", manifest.identity)
    console.print(table)
    if manifest.class_counts:
        console.print(_classes(manifest))


def _members(parts: list[np.ndarray]) -> dict[str, int]:
    """Samples that have a member beside image and label, by its suffix."""
    found: Counter[str] = Counter()
    for records in parts:
        for name in (name for name in records.dtype.names or () if name.startswith(EXTRA)):
            found[name.removeprefix(EXTRA)] += int((records[name]["offset"] > 0).sum())
    return dict(sorted(found.items()))


def _spread(values: np.ndarray) -> str:
    known = values[values > 0]
    if not len(known):
        return "unknown"
    low, middle, high = known.min(), np.median(known), known.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, median {middle:,.0f}"


def _classes(manifest: Manifest) -> Table:
    table = Table("label", "class", "samples", "share")
    labels = sorted({*manifest.class_counts, *range(len(manifest.classes or ()))})
    for label in labels[:MOST_CLASSES]:
        count = manifest.class_counts.get(label, 0)
        table.add_row(str(label), manifest.class_name(label), f"{count:,}", f"{count / manifest.samples:.1%}")
    if len(labels) > MOST_CLASSES:
        rest = sum(manifest.class_counts.get(label, 0) for label in labels[MOST_CLASSES:])
        table.add_row("...", f"{len(labels) - MOST_CLASSES} more", f"{rest:,}", f"{rest / manifest.samples:.1%}")
    return table
