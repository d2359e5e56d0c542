"""The classes of a mixture: what each set's own are called in it, and all of them in one list."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.errors import InputError, nearest
from penstock.streams.sets.manifest import Manifest

if TYPE_CHECKING:
    from penstock.streams.positions.mixture import MixedSet


def names_of(name: str, options: "MixedSet", manifest: Manifest) -> list[str | None]:
    """What the mixture calls each class of a set; None for what is to have no label."""
    own = list(manifest.classes or [str(label) for label in range(max(manifest.class_counts, default=-1) + 1)])
    if options.classes is None:
        return list(own)
    if options.classes == "none":
        return [None] * len(own)
    given, key = _map(name, options.classes), f"data.train.{name}.classes"
    for theirs in given:
        if theirs not in own:
            raise InputError(f"{key}: {manifest.root} has no class {theirs!r}{nearest(theirs, own)}")
    missing = [theirs for theirs in own if theirs not in given]
    if missing:
        known = [ours for ours in given.values() if ours]
        raise InputError(
            f"{key}: it says nothing of {_brief(missing)}; write `{missing[0]}: NAME`{nearest(missing[0], known)}, or "
            f"`{missing[0]}: null` to leave those samples without label"
        )
    return [given[theirs] for theirs in own]


def _map(name: str, classes: dict[str, str | None] | str) -> dict[str, str | None]:
    if isinstance(classes, dict):
        return classes
    import yaml

    key = f"data.train.{name}.classes"
    try:
        read = yaml.safe_load(Path(classes).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{key}: {classes} cannot be read: {error}; write none, or a map of class names") from None
    if not isinstance(read, dict) or not all(ours is None or isinstance(ours, str) for ours in read.values()):
        raise InputError(f"{key}: {classes} must hold lines `their_class: our_class`, or null for no label")
    return {str(theirs): ours for theirs, ours in read.items()}


def union_of(
    named: Mapping[str, Sequence[str | None]], options: Mapping[str, "MixedSet"], manifests: Mapping[str, Manifest]
) -> tuple[str, ...] | None:
    """All classes in one list, sorted where those of each set are; None where labels are numbers in all sets."""
    numbered = [n for n in named if manifests[n].classes is None and options[n].classes is None and any(named[n])]
    lists = {name: [ours for ours in names if ours] for name, names in named.items() if any(names)}
    if len(numbered) == len(lists):
        return None
    if numbered:
        other = next(name for name in lists if name not in numbered)
        raise InputError(
            f"data.train.{numbered[0]}.classes: {manifests[numbered[0]].root} has numbers for classes and "
            f"{manifests[other].root} has names; give each number a name, `0: {lists[other][0]}`, or write none"
        )
    found = list(dict.fromkeys(ours for names in lists.values() for ours in names))
    _refuse_near_twins({n: names for n, names in lists.items() if options[n].classes is None})
    in_order = all(manifests[n].classes == tuple(sorted(manifests[n].classes or ())) for n in lists)
    return tuple(sorted(found) if in_order else found)


def _refuse_near_twins(lists: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError for two classes that differ in case, spaces, hyphens or underscores alone."""
    from penstock.class_names import normal

    seen: dict[str, tuple[str, str]] = {}
    for name, names in lists.items():
        for ours in names:
            other, spelled = seen.setdefault(normal(ours), (name, ours))
            if spelled != ours and other != name:
                raise InputError(
                    f"data.train.{name}.classes: {ours!r} here is {spelled!r} in {other}, which would be two classes; "
                    f"give a map, such as `{ours}: {spelled}` (and `{ours}: {ours}` if they are two)"
                )


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
