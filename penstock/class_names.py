"""Classes by name: whether two lists agree, and which class of one list is which of another."""

import re
from collections.abc import Callable, Sequence

from penstock.errors import InputError

_SYNSET = re.compile(r"n\d{8}")
# Classifiers of so many classes are ImageNet's, in timm's order (timm.data.infer_imagenet_subset).
_IMAGENET = (1000, 11221, 11821, 21841, 21842, 21843)


def check_classes(
    ours: Sequence[str], theirs: Sequence[str], where: str, what: str = "the classifier", remedy: str | None = None
) -> None:
    """InputError naming the first difference between a classifier's classes and those of the data at `where`.

    Args:
        remedy: what to do instead, where it is not the data that is to be packed otherwise.
    """
    if list(ours) == list(theirs):
        return
    if len(ours) != len(theirs):
        absent = [name for name in theirs if name not in ours] or [name for name in ours if name not in theirs]
        first = f"; {absent[0]!r} is in one of them alone" if absent else ""
        raise InputError(
            f"{what} has {len(ours)} classes and {where} has {len(theirs)}{first}; "
            f"{remedy or 'pack the data with the same folders of classes'}"
        )
    label = next(index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    same = "the same classes in another order" if sorted(ours) == sorted(theirs) else "other classes"
    raise InputError(
        f"{where} has {same}: label {label} is {theirs[label]!r} there and {ours[label]!r} in {what}; "
        + (remedy or "pack the data with folders of the classifier's names, whose sorted order gives the labels")
    )


def match_classes(new: Sequence[str], old: Sequence[str]) -> dict[int, int]:
    """For each class of `new` that is among `old`, where it is there.

    Names agree up to case, spaces, hyphens and underscores. A synset, such as n01440764, also answers to its names in
    WordNet, unless another class of the list answers to the same one.
    """
    exact = _lookup([[normal(name)] for name in old])
    found = {label: exact[normal(name)] for label, name in enumerate(new) if normal(name) in exact}
    if any(map(_is_synset, (*new, *old))):
        spoken, spoken_old = _spoken(new), _spoken(old)
        unique, unique_old = _lookup(spoken), _lookup(spoken_old)
        for label, aliases in enumerate(spoken):
            places = {unique_old[alias] for alias in aliases if unique.get(alias) == label and alias in unique_old}
            places = {place for place in places if _is_synset(old[place]) != _is_synset(new[label])}
            if label not in found and len(places) == 1:
                found[label] = places.pop()
    return found


def imagenet_names(classes: int) -> list[str] | None:
    """The synsets of timm's ImageNet classifiers with so many classes; None when there is no such ImageNet."""
    if classes not in _IMAGENET:
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset

    return ImageNetInfo(str(infer_imagenet_subset({"num_classes": classes}))).label_names()


def _lookup(aliases: Sequence[Sequence[str]]) -> dict[str, int]:
    """Label by alias, without the aliases that several labels have."""
    labels: dict[str, set[int]] = {}
    for label, names in enumerate(aliases):
        for name in names:
            labels.setdefault(name, set()).add(label)
    return {name: owners.copy().pop() for name, owners in labels.items() if len(owners) == 1}


def _spoken(names: Sequence[str]) -> list[list[str]]:
    if not any(map(_is_synset, names)):
        return [[normal(name)] for name in names]
    from timm.data import ImageNetInfo

    lemmas = ImageNetInfo("imagenet-1k").label_name_to_description
    return [[normal(part) for part in _described(name, lemmas).split(",")] for name in names]


def _described(name: str, lemmas: Callable[[str], str]) -> str:
    try:
        return lemmas(name) if _is_synset(name) else name
    except KeyError:  # a synset that ImageNet has not
        return name


def _is_synset(name: str) -> bool:
    return _SYNSET.fullmatch(name.strip()) is not None


def normal(name: str) -> str:
    """A name without what spellings differ in: case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
