"""The measuring: answers of every network on the same images, then the costs of all in turns."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from penstock import distributed
from penstock.classification import CHUNK, classification_metrics
from penstock.cost import BATCHES, ROUNDS, Cost, Image, file_bytes, latencies, macs, parameters
from penstock.errors import InputError
from penstock.evaluate._classifier import answer, check_set, prepared, side_of
from penstock.evaluate._features import FeatureSet
from penstock.export import Classifier, load_classifier
from penstock.machine import facts
from penstock.paired import METRICS, Comparison, Predictions
from penstock.streams.sets.manifest import Manifest
from penstock.students._networks import ALONE, DISTILLED, TEACHER, Entry, Group, Network, entry, same_classes, taught_by
from penstock.students._report import Gain, Report, Row

UNSTEADY = 1.5  # times the lower quartile: a machine that others use


def compare(
    teacher: Entry | str,
    students: Sequence[Entry | str],
    manifest: Manifest,
    *,
    batch: int = 256,
    workers: int = 2,
    limit: int | None = None,
    rounds: int = ROUNDS,
    threads: int | None = None,
) -> Report:
    """Measure a teacher and its students on one labelled set, and what each costs on this machine.

    Args:
        teacher, students: run or export folders, as `RUN` or `NAME=RUN,RUN`; the runs of one student differ in their
            seed alone.
        limit: measure a fixed subset of so many images.
        rounds, threads: of the latency, as in `penstock.cost.latencies`.

    Raises:
        InputError: one is no classifier, or they know other classes than the teacher or the set, or in another order.
    """
    given = [each if isinstance(each, Entry) else entry(each) for each in (teacher, *students)]
    _names_differ(given)
    groups = [Group.open(each) for each in given]
    first, *others = groups
    if len(first.networks) > 1:
        raise InputError(f"{first.name}: students are compared with one teacher; give one of its runs")
    for group in others:
        for network in group.networks:
            same_classes(first.first, network)
    work = _Work(manifest, batch, workers, limit)
    comparison = Comparison(work.predictions(groups))
    rows = [work.row(group, TEACHER if group is first else group.role) for group in groups]
    kinds = {row.name: _kind(group, row) for group, row in zip(groups, rows, strict=True)}
    timed = {kind: work.models[name] for name, kind in kinds.items()}  # networks that cost the same are timed once
    found = latencies(timed, BATCHES, rounds, threads, distributed.device())
    for row in rows:
        row.cost.latency.update(found[kinds[row.name]])
    pairs, warnings = _pairs(others)
    warnings = [*work.warnings, *warnings, *_doubts(first, others, rows)]
    gains = [Gain(d.name, a.name, *_effects(comparison, d, a)) for d, a in pairs]
    data = {"set": str(manifest.root), "identity": manifest.identity, "images": comparison.images}
    data["unreadable"] = work.unreadable
    machine = {**facts(), "threads": str(threads or torch.get_num_threads())}
    return Report(rows[0], rows[1:], gains, data, machine, rounds, warnings)


class _Work:
    """Runs the networks one after the other, and remembers their figures and what time is measured of."""

    def __init__(self, manifest: Manifest, batch: int, workers: int, limit: int | None):
        self.manifest, self.batch, self.workers, self.limit = manifest, batch, workers, limit
        self.figures: dict[str, dict[str, float]] = {}  # by place
        self.models: dict[str, tuple[Classifier, Image]] = {}  # of each row's first run, by name
        self.warnings: list[str] = []
        self.unreadable = 0
        self._taught: Tensor | None = None  # the teacher's logits

    def predictions(self, groups: Sequence[Group]) -> Iterator[tuple[str, Predictions]]:
        """Of every network by its place, the teacher first; each place once."""
        for group in groups:
            for network in group.networks:
                classifier, image, answers = self._answers(network)
                if network is group.first:
                    self.models[group.name] = classifier, image
                if network.place in self.figures:  # as a teacher compared with itself
                    continue
                self.figures[network.place] = figures(answers, classifier.temperature, self._taught)
                if self._taught is None:
                    self._taught = answers.features
                columns = (answers.positions, answers.labels, answers.features)
                yield network.place, Predictions(*(values.numpy() for values in columns))

    def _answers(self, network: Network) -> tuple[Classifier, Image, FeatureSet]:
        classifier = load_classifier(network.export)
        told = check_set(classifier, self.manifest)
        augment = prepared(classifier, None, None)
        side = side_of(augment)
        answers = answer(classifier, self.manifest, augment, str(network.export), self.batch, self.workers, self.limit)
        self.unreadable = answers.unreadable
        if answers.unreadable:
            told.append(f"{answers.unreadable} images could not be read and are left out; `penstock shards verify`")
        self.warnings += [text for text in told if text not in self.warnings]
        return classifier, (classifier.backbone.config.channels, side, side), answers

    def row(self, group: Group, role: str) -> Row:
        model, image = self.models[group.name]
        cost = Cost(parameters(model), macs(model, image), image, file_bytes(group.first.export))
        places = [network.place for network in group.networks]
        runs = [dict(self.figures[place]) for place in places]
        if role != TEACHER:  # the teacher may be among its students, to see the comparison at zero
            runs = [{"agreement": 100.0, "kl": 0.0, **run} for run in runs]
        return Row(group.name, role, group.first.how, places, [each.seed for each in group.networks], runs, cost)


def figures(answers: FeatureSet, temperature: float, taught: Tensor | None) -> dict[str, float]:
    """One network's figures, by the names of `FIGURES`.

    Args:
        answers: logits as features.
        temperature: of the export.
        taught: the teacher's logits [n, K], of the same images; None for the teacher itself.
    """
    metrics = classification_metrics(answers.features, answers.labels)
    scaled = classification_metrics(answers.features.double() / temperature, answers.labels)
    found = {name: metrics[name] for name in ("top1", "nll", "ece")}
    found |= {f"{name}_scaled": scaled[name] for name in ("nll", "ece")} | {"temperature": temperature}
    if taught is None:
        return found
    if taught.shape != answers.features.shape:
        raise InputError(f"the teacher answered {len(taught)} images, a student {len(answers)}; some cannot be read")
    return found | {
        "agreement": 100 * (answers.features.argmax(1) == taught.argmax(1)).double().mean().item(),
        "kl": divergence(taught, answers.features),
    }


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean KL(teacher || student) in nats, in fp64, from logits [n, K] of the same images."""
    total = 0.0
    for rows, others in zip(teacher.split(CHUNK), student.split(CHUNK), strict=True):
        own, its = rows.double().log_softmax(1), others.double().log_softmax(1)
        total += (own.exp() * (own - its)).sum().item()
    return total / len(teacher)


def _pairs(groups: Sequence[Group]) -> tuple[list[tuple[Group, Group]], list[str]]:
    """(distilled, alone) of the same student, and warnings; where several are alone, one of the same budget."""
    pairs, warnings = [], []
    for group in groups:
        if group.role != DISTILLED:
            continue
        alone = [
            other for other in groups
            if other.role == ALONE and other.first.architecture == group.first.architecture
        ]  # fmt: skip
        if not alone:
            continue
        budget = group.first.budget
        other = next((each for each in alone if each.first.budget == budget), alone[0])
        pairs.append((group, other))
        if not {each.seed for each in group.networks} & {each.seed for each in other.networks} - {None}:
            warnings.append(
                f"{group.name} and {other.name} have no seed in common; their runs are paired in their order"
            )
        theirs = other.first.budget
        differ = [f"{key} {budget[key]} and {theirs[key]}" for key in budget if theirs and budget[key] != theirs[key]]
        if differ:
            warnings.append(
                f"{group.name} and {other.name} were not trained on the same budget ({', '.join(differ)}), so their "
                "difference is not distillation's alone"
            )
    return pairs, warnings


def _effects(comparison: Comparison, distilled: Group, alone: Group):
    """Effects by metric over pairs of runs, and flips. Runs of the same seed are pairs, else runs in their order."""
    seeds = {network.seed: network.place for network in alone.networks if network.seed is not None}
    pairs = [(each.place, seeds[each.seed]) for each in distilled.networks if each.seed in seeds]
    pairs = pairs or [(a.place, b.place) for a, b in zip(distilled.networks, alone.networks, strict=False)]
    return {metric: comparison.effect(pairs, metric) for metric in METRICS}, comparison.flips(pairs)


def _kind(group: Group, row: Row) -> str:
    """Equal for networks that differ in the values of their weights alone."""
    return f"{group.first.architecture} {row.cost.parameters} {row.cost.macs} {row.cost.image}"


def _doubts(teacher: Group, students: Sequence[Group], rows: Sequence[Row]) -> Iterator[str]:
    unsteady = [row.name for row in rows if any(t.high > UNSTEADY * t.low for t in row.cost.latency.values())]
    if unsteady:
        yield (
            f"the times of {', '.join(unsteady)} differ by more than half between the quartiles of the rounds: the "
            "machine is busy, so do not quote them; measure again when it is idle, or with more --rounds"
        )
    its = rows[0].cost
    for group, row in zip(students, rows[1:], strict=True):
        for what, own, theirs in (
            ("parameters", row.cost.parameters, its.parameters),
            ("MACs", row.cost.macs, its.macs),
        ):
            if own > theirs:
                yield f"{group.name} has more {what} than its teacher, {own / 1e6:.3g} M against {theirs / 1e6:.3g} M"
        if taught_by(group.first, teacher.first) is False:
            yield (
                f"{group.name} was distilled from {group.first.teacher}, not from {teacher.first.place}: its agreement "
                "is with another teacher than its own"
            )


def _names_differ(given: Sequence[Entry]) -> None:
    names = [each.name for each in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two networks are called {twice[0]}; name them, as NAME=RUN")
