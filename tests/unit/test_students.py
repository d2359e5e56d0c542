"""Teacher and students side by side: figures by slow formulas, seeds in groups, refusals, and what is drawn."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from penstock.adopt import adopt
from penstock.backbones import Backbone
from penstock.cli import main
from penstock.cost import Cost, Latency
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.export import export_classifier, load_classifier
from penstock.head import Head
from penstock.paired import Effect
from penstock.streams.sets.manifest import Manifest
from penstock.students import Gain, Report, Row, as_json, compare, draw, entry, markdown
from penstock.students._networks import Network
from penstock.students._picture import spread
from penstock.students._text import cells, quantity
from penstock.students._work import divergence, figures
from penstock.tracking.journal import read_run
from tests.shards import write_set

IMAGES = 40
CLASSES = tuple("abcdefghij")
SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
LARGE = {**SMALL, "embed_dim": 48, "depth": 2}
TASKS = {
    "classify": {"name": "classify"},
    "distill": {"name": "distill", "losses": {"soft_targets": {"weight": 1.0}, "dist": {"weight": 2.0}, "rkd": None}},
}


def make(
    folder: Path,
    seed: int = 0,
    options: dict = SMALL,
    task: str = "classify",
    classes: tuple[str, ...] = CLASSES,
    temperature: float = 1.5,
    name: str = "vit_tiny_patch16_224",
    head: str = "linear",
    **recipe: Any,
) -> str:
    """A run folder with an export of random weights, as a run leaves it."""
    torch.manual_seed(seed)
    backbone = Backbone(Backbone.Config(name=name, size=8, options=options))
    made = Head(Head.Config(kind=head, init_std=1.0), backbone.dim, len(classes), backbone)
    nn.init.normal_(made.linear.bias)
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    state |= {f"head.{key}": value for key, value in made.state_dict().items()}
    about = {"run": folder.name, "task": task}
    folder.mkdir(parents=True)
    export_classifier(
        state, backbone.config, made.config, folder / "export", classes, about, {"crop_pct": 0.875}, temperature
    )
    values = {"seed": seed, "duration": "5 epochs", "batch": 8, "task": TASKS[task] | recipe.pop("teacher", {})}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | recipe, sort_keys=False))
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A packed set, a teacher, and a student alone and distilled with two seeds."""
    folder = tmp_path_factory.mktemp("students")
    replace(write_set(folder / "val", [25, 15]), classes=CLASSES).save(folder / "val")
    make(folder / "teacher", seed=9, options=LARGE)
    for seed in (0, 1):
        make(folder / f"alone-{seed}", seed)
        make(folder / f"distilled-{seed}", 10 + seed, task="distill", teacher={"teacher": str(folder / "teacher")})
        values = yaml.safe_load((folder / f"distilled-{seed}" / "recipe.yaml").read_text())
        (folder / f"distilled-{seed}" / "recipe.yaml").write_text(
            yaml.safe_dump(values | {"seed": seed}, sort_keys=False)
        )
    return folder


@pytest.fixture(scope="module")
def report(place) -> Report:
    groups = [f"alone={place}/alone-1,{place}/alone-0", f"distilled={place}/distilled-0,{place}/distilled-1"]
    return compare(str(place / "teacher"), groups, Manifest.load(place / "val"), workers=0, rounds=2, threads=1)


def logits(place: Path, name: str) -> np.ndarray:
    """Of one image at a time, read without any stream."""
    from penstock.augment.resize_crop import ResizeCrop
    from penstock.streams.evaluation import EvalStream
    from penstock.streams.images import Images

    classifier = load_classifier(place / name / "export")
    augment = ResizeCrop(ResizeCrop.Config(size=8, crop_pct=0.875, interpolation="bicubic"))
    stream = EvalStream(Images(Manifest.load(place / "val"), channels=3), augment, batch=1)
    with torch.no_grad():
        return torch.stack([classifier(stream.view(number)[None])[0] for number in range(IMAGES)]).double().numpy()


def steady(report: Report) -> list[str]:
    """Its warnings, but for those of time."""
    return [text for text in report.warnings if "the machine is busy" not in text]


def softmax(row: np.ndarray) -> list[float]:
    total = sum(math.exp(value - max(row)) for value in row)
    return [math.exp(value - max(row)) / total for value in row]


def test_figures_by_slow_formulas(place, report):
    teacher = [softmax(row) for row in logits(place, "teacher")]
    for row, name in zip(report.students, ("alone", "distilled"), strict=True):
        for run, seed in zip(row.runs, row.seeds, strict=True):
            own = [softmax(each) for each in logits(place, f"{name}-{seed}")]
            labels = [number % 10 for number in range(IMAGES)]
            same = sum(p.index(max(p)) == q.index(max(q)) for p, q in zip(teacher, own, strict=True))
            right = sum(q.index(max(q)) == label for q, label in zip(own, labels, strict=True))
            kl = sum(
                sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in zip(teacher, own, strict=True)
            )
            nll = -sum(math.log(q[label]) for q, label in zip(own, labels, strict=True))
            assert run["agreement"] == pytest.approx(100 * same / IMAGES)
            assert run["top1"] == pytest.approx(100 * right / IMAGES)
            assert run["kl"] == pytest.approx(kl / IMAGES, rel=1e-4)
            assert run["nll"] == pytest.approx(nll / IMAGES, rel=1e-4)
            scaled = [softmax(each / 1.5) for each in logits(place, f"{name}-{seed}")]
            nll = -sum(math.log(q[label]) for q, label in zip(scaled, labels, strict=True)) / IMAGES
            assert run["nll_scaled"] == pytest.approx(nll, rel=1e-4) and run["temperature"] == 1.5
    assert "agreement" not in report.teacher.runs[0] and "kl" not in report.teacher.runs[0]


def test_divergence_has_a_direction_and_is_exact_over_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 3, (2, 23, 5))
    want = [sum(a * math.log(a / b) for a, b in zip(softmax(x), softmax(y), strict=True)) for x, y in zip(p, q)]  # noqa: B905
    a, b = torch.from_numpy(p).float(), torch.from_numpy(q).float()
    assert divergence(a, b) == pytest.approx(sum(want) / 23, rel=1e-5)
    assert divergence(a, b) != pytest.approx(divergence(b, a), rel=1e-2)
    monkeypatch.setattr("penstock.students._work.CHUNK", 7)
    assert divergence(a, b) == pytest.approx(sum(want) / 23, rel=1e-5)
    far = torch.tensor([[500.0, 0.0], [0.0, 300.0]])
    assert divergence(far, -far) == pytest.approx(400) and divergence(far, far) == 0


def test_a_network_agrees_with_itself(place):
    teacher = str(place / "teacher")
    manifest = Manifest.load(place / "val")
    found = compare(teacher, [f"copy={place}/teacher/export"], manifest, workers=0, rounds=1)
    again = compare(teacher, [f"same={teacher}"], manifest, workers=0, rounds=1)
    for each in (found, again):
        (row,) = each.students
        assert row.runs[0]["agreement"] == 100 and row.runs[0]["kl"] == 0
        assert {name: row.runs[0][name] for name in each.teacher.runs[0]} == each.teacher.runs[0]
        assert not steady(each) and (row.cost.macs, row.cost.bytes) == (
            each.teacher.cost.macs,
            each.teacher.cost.bytes,
        )


def test_seeds_are_grouped(place, report):
    alone, distilled = report.students
    assert (alone.role, distilled.role, distilled.how) == ("alone", "distilled", "soft_targets + dist")
    assert (alone.seeds, distilled.seeds) == ([1, 0], [0, 1])
    values = [run["top1"] for run in alone.runs]
    assert alone.mean("top1") == pytest.approx(sum(values) / 2)
    assert alone.spread("top1") == pytest.approx(np.std(values, ddof=1)) == alone.error(IMAGES)
    share = report.teacher.runs[0]["top1"] / 100
    assert report.teacher.error(IMAGES) == pytest.approx(100 * math.sqrt(share * (1 - share) / IMAGES))
    assert not steady(report)
    assert alone.cost.latency == distilled.cost.latency != report.teacher.cost.latency


def test_gains_are_paired_by_seed(place, report):
    (gain,) = report.gains
    assert (gain.distilled, gain.alone) == ("distilled", "alone")
    labels = np.arange(IMAGES) % 10
    right = {
        name: logits(place, name).argmax(1) == labels for name in ("alone-0", "alone-1", "distilled-0", "distilled-1")
    }
    gained = sum(int((right[f"distilled-{s}"] & ~right[f"alone-{s}"]).sum()) for s in (0, 1))
    lost = sum(int((~right[f"distilled-{s}"] & right[f"alone-{s}"]).sum()) for s in (0, 1))
    assert gain.flips == (gained, lost)
    effect = gain.effects["top1"]
    assert effect.value == pytest.approx(100 * (gained - lost) / IMAGES / 2) and effect.seeds == 2
    assert effect.low < effect.value < effect.high


def test_seeds_that_one_has_alone_are_left_out_of_the_gain(place):
    students = [f"alone={place}/alone-1", f"distilled={place}/distilled-0,{place}/distilled-1"]
    found = compare(str(place / "teacher"), students, Manifest.load(place / "val"), workers=0, rounds=1)
    assert found.gains[0].effects["nll"].seeds == 1
    a, b = (next(row for row in found.students if row.name == name) for name in ("distilled", "alone"))
    assert found.gains[0].effects["nll"].value == pytest.approx(a.runs[1]["nll"] - b.runs[0]["nll"], rel=1e-4)


def test_costs_are_those_of_the_student(place, report):
    teacher, alone = report.teacher.cost, report.students[0].cost
    classifier = load_classifier(place / "alone-0" / "export")
    assert alone.parameters == sum(value.numel() for value in classifier.parameters())
    assert alone.bytes == (place / "alone-0" / "export" / "model.safetensors").stat().st_size
    assert alone.image == (3, 8, 8) and set(alone.latency) == {1, 32}
    found = as_json(report)["students"][0]["times_smaller_than_teacher"]
    assert found["parameters"] == pytest.approx(teacher.parameters / alone.parameters) and found["parameters"] > 4
    assert found["macs"] == pytest.approx(teacher.macs / alone.macs)


def test_a_distillation_token_does_not_make_another_student(tmp_path):
    deit = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    one = make(tmp_path / "one", name="deit_tiny_patch16_224", options=deit)
    two = make(tmp_path / "two", name="deit_tiny_distilled_patch16_224", options=deit, head="distilled", task="distill")
    other = make(tmp_path / "other", name="deit_tiny_patch16_224", options={**deit, "depth": 2})
    assert Network.open(one).architecture == Network.open(two).architecture != Network.open(other).architecture


# Refusals and warnings --------------------------------------------------------------------------


@pytest.fixture
def refused(place, tmp_path, capsys):
    def run(*students: str, teacher: str = "", data: str = "", more: tuple[str, ...] = ()) -> str:
        words = ["students", teacher or str(place / "teacher"), *students, "--data", data or str(place / "val")]
        assert main([*words, "--workers", "0", "--rounds", "1", *more]) == INPUT_WRONG
        said = capsys.readouterr().err
        assert said.startswith("penstock: ") and "Traceback" not in said
        return " ".join(said.split())

    return run


def test_other_classes_are_refused(place, refused, tmp_path):
    swapped = make(tmp_path / "swapped", classes=("b", "a", *CLASSES[2:]))
    said = refused(swapped)
    assert f"{swapped} has the same classes in another order: label 0 is 'b' there and 'a' in the teacher" in said
    assert "finetune both" in said and "pack" not in said
    assert "has other classes: label 9 is 'z'" in refused(make(tmp_path / "other", classes=(*CLASSES[:9], "z")))
    assert "has 10 classes and" in refused(make(tmp_path / "more", classes=(*CLASSES, "k")))


def test_a_set_of_other_classes_is_refused(place, refused, tmp_path):
    shutil.copytree(place / "val", tmp_path / "val")
    replace(Manifest.load(tmp_path / "val"), classes=(*CLASSES[:9], "z")).save(tmp_path / "val")
    assert "label 9 is 'z' there" in refused(str(place / "alone-0"), data=str(tmp_path / "val"))


def test_what_is_no_network_is_refused(place, refused, tmp_path):
    assert "is no export and holds none" in refused(str(tmp_path))
    assert "one teacher" in refused(str(place / "alone-0"), teacher=f"t={place}/alone-0,{place}/alone-1")
    assert "two networks are called alone-0" in refused(str(place / "alone-0"), f"{place}/alone-0/export")
    assert "--labels gives 2 names for 3" in refused(*[str(place / "alone-0")] * 3, more=("--labels", "a,b"))
    assert "--track needs --out" in refused(str(place / "alone-0"), more=("--track",))
    shutil.copytree(place / "alone-0", tmp_path / "cut")
    (tmp_path / "cut" / "export" / "model.safetensors").write_bytes(b"")
    assert "is damaged" in refused(str(tmp_path / "cut"))


def test_runs_of_one_name_differ_in_their_seed_alone(place, refused, tmp_path):
    mixed = f"mixed={place}/alone-0,{place}/distilled-0"
    assert "differ in training" in refused(mixed)
    large = make(tmp_path / "large", options=LARGE)
    assert "differ in architecture" in refused(f"mixed={place}/alone-0,{large}")
    longer = make(tmp_path / "longer", seed=3, duration="9 epochs")
    assert "differ in budget" in refused(f"mixed={place}/alone-0,{longer}")


@pytest.mark.parametrize(
    "text,name,places",
    [
        ("runs/small", "small", ("runs/small",)),
        ("runs/small/export", "small", ("runs/small/export",)),
        ("tiny ViT=runs/a,runs/b", "tiny ViT", ("runs/a", "runs/b")),
    ],
)
def test_how_a_row_is_given(text, name, places):
    assert (entry(text).name, entry(text).places) == (name, places)
    assert entry(text, "other").name == "other"


@pytest.mark.parametrize("text", ["a=", "runs/a,runs/b", "../x=runs/a", "a=runs/a,runs/../runs/a"])
def test_how_a_row_is_not_given(text):
    with pytest.raises(InputError):
        entry(text)


def test_a_folder_may_have_an_equals_sign(tmp_path):
    (tmp_path / "lr=1,wd=2").mkdir()
    assert entry(str(tmp_path / "lr=1,wd=2")).places == (str(tmp_path / "lr=1,wd=2"),)


def test_doubts_are_told(place, tmp_path):
    manifest = Manifest.load(place / "val")
    large = make(tmp_path / "large", options={**LARGE, "depth": 3})
    shorter = make(tmp_path / "shorter", duration="2 epochs", task="distill", teacher={"teacher": large})
    given = [large, shorter, f"alone={place}/alone-0"]
    found = steady(compare(str(place / "teacher"), given, manifest, workers=0, rounds=1))
    assert [text for text in found if "large has more parameters than its teacher" in text]
    assert [text for text in found if "large has more MACs" in text]
    assert [
        text for text in found if "shorter and alone were not trained on the same budget (duration 2 epochs" in text
    ]
    assert [text for text in found if f"shorter was distilled from {large}, not from" in text]
    assert len(found) == 4


def test_unsteady_times_are_told(place, monkeypatch):
    import penstock.students._work as work

    def timed(models, batches, *_):
        spread = dict(zip(models, ((1.0, 1.4), (1.0, 1.6)), strict=True))
        return {name: {b: Latency(1.2, *ends, (1.2,)) for b in batches} for name, ends in spread.items()}

    monkeypatch.setattr(work, "latencies", timed)
    found = compare(str(place / "teacher"), [str(place / "alone-0")], Manifest.load(place / "val"), workers=0)
    (warning,) = found.warnings
    assert warning.startswith("the times of alone-0 differ")


def test_figures_need_the_same_images():
    from penstock.evaluate._features import FeatureSet

    answers = FeatureSet(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    with pytest.raises(InputError, match="some cannot be read"):
        figures(answers, 1.0, torch.zeros(4, 2))


# What is shown ------------------------------------------------------------------------------------


def test_the_command(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out = tmp_path / "report"
    groups = [f"{name}={place}/{name}-0,{place}/{name}-1" for name in ("alone", "distilled")]
    command = ["students", str(place / "teacher"), *groups, "--data", str(place), "--workers", "0", "--rounds", "2"]
    assert main([*command, "--out", str(out), "--labels", "big,small,small KD"]) == DONE
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 120
    for words in ("big", "distilled: soft_targets", "2 runs", "small KD", "- small", "interleaved rounds"):
        assert words in shown, words
    assert {file.name for file in out.iterdir()} == {"report.json", "report.md", "students.png"}
    kept = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert main([*command, "--format", "json"]) == DONE
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert kept["students"][1]["name"] == "small KD" and told["students"][1]["name"] == "distilled"
    assert kept["students"][1]["figures"] == told["students"][1]["figures"]


def test_json_has_every_figure(report):
    found = json.loads(json.dumps(as_json(report), allow_nan=False))
    for row in (found["teacher"], *found["students"]):
        wanted = {"top1", "nll", "nll_scaled", "ece", "ece_scaled", "temperature"}
        wanted |= {"agreement", "kl"} if row["role"] != "teacher" else set()
        assert wanted <= row["figures"].keys() and wanted == row["runs"][0].keys()
        assert row["cost"].keys() == {"parameters", "macs", "bytes", "image", "latency_ms"}
        assert row["cost"]["latency_ms"].keys() == {"1", "32"}
        assert row["times_smaller_than_teacher"].keys() == {
            "parameters", "macs", "bytes", "latency_ms_1", "latency_ms_32",
        }  # fmt: skip
    assert found["gains"][0]["effects"].keys() == {"top1", "ece", "nll"}
    assert found["data"]["images"] == IMAGES and found["machine"]["threads"] == "1"
    assert "cores" in found["machine"]["machine"] and found["machine"]["load"]


def test_tracked_as_a_run(place, tmp_path, capsys):
    """Its journal is what MLflow gets; made again, the figures are a further step of the same run."""
    from penstock.evaluate._students import _store, keep, track
    from penstock.tracking import Tracker

    out = tmp_path / "runs" / "report"
    found = compare(str(place / "teacher"), [f"small KD={place}/distilled-0"], Manifest.load(place / "val"), rounds=1)
    for _ in range(2):
        keep(found, out)
        track(found, out, None, enabled=False)
    run = read_run(out)
    agreement = found.students[0].mean("agreement")
    assert run.series["small KD/agreement"] == [(0, agreement), (1, agreement)]
    assert run.series["teacher/latency_ms_32"][0][1] == found.teacher.cost.latency[32].median
    assert run.tags["network.small KD"] == f"{place}/distilled-0" and run.status == "FINISHED"
    entries = [entry(str(tmp_path / name)) for name in ("teacher", "one", "two")]
    assert _store(entries) is None  # they were kept from MLflow
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Tracker(Tracker.Config(enabled=False), tmp_path / name, name, {}, {}, active=True).close("FINISHED")
        (tmp_path / name / "run.json").write_text(json.dumps({"uri": f"sqlite:///{tmp_path}/mlflow.db"}))
    assert _store(entries) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"


def invented(count: int, top1: float = 90.0) -> Report:
    """A report with `count` students, every other one distilled from the one before."""

    def row(name: str, role: str, top1: float, size: float) -> Row:
        time = Latency(size, 0.9 * size, 1.2 * size, (size,))
        cost = Cost(int(1e6 * size), int(3e8 * size), (3, 224, 224), int(4e6 * size), {1: time, 32: time})
        runs = [{"top1": top1, "nll": 0.3, "ece": 2.0, "ece_scaled": 1.0, "agreement": 95.0, "kl": 0.1}]
        return Row(name, role, "", ["runs/x"], [0], runs, cost)

    students = []
    for number in range(count):
        role = "distilled" if number % 2 else "alone"
        size = 1 + number // 2
        students.append(row(f"student number {size} {role}", role, top1 - 3 + 0.1 * size + 0.8 * (number % 2), size))
    effect = Effect(0.8, 0.1, 1.5, 1)
    gains = [
        Gain(students[n].name, students[n - 1].name, {"top1": effect, "ece": effect, "nll": effect}, (9, 1))
        for n in range(1, count, 2)
    ]
    data = {"set": "data/val", "identity": "0", "images": 10_000, "unreadable": 0}
    return Report(row("teacher", "teacher", top1, 25), students, gains, data, {"machine": "2 cores"}, 15)


@pytest.mark.parametrize("count", [1, 2, 6, 24])
def test_the_picture_is_drawn(count, tmp_path, monkeypatch):
    """Nothing that is written overlaps or leaves the figure."""
    from matplotlib.figure import Figure

    drawn = []
    subplots = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self, *a, **o: drawn.append(self) or subplots(self, *a, **o))
    draw(invented(count), tmp_path / "a.png")
    figure = drawn[0]
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for panel in figure.axes:
        texts += [*panel.texts, *panel.get_xticklabels(), panel.xaxis.label]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for other in boxes[:number]:
            assert not box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9))
    assert len([text for panel in figure.axes for text in panel.texts if text.get_text()]) == count + 1
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_equal_accuracy_and_cost_are_drawn(tmp_path):
    made = invented(1)
    draw(replace(made, students=[replace(made.teacher, name="same")]), tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_names_are_moved_apart():
    assert spread([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.0, 0.0, 0.0], 0.1) == pytest.approx([0, 0.1, 0.2])
    assert spread([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = spread(sorted(rng.random(8)), 0.1)
        assert min(np.diff(found)) >= 0.1 - 1e-9 and found[0] >= -1e-9 and found[-1] <= 1 + 1e-9


def test_markdown_holds_what_the_terminal_shows():
    made = invented(2)
    text = markdown(made)
    rows = [line for line in text.splitlines() if line.startswith("| student number 1 distilled (distilled)")]
    assert len(rows) == 1 and "÷ 25" in rows[0] and "1 M" in rows[0] and "87.90 ± 0.33" in rows[0]
    assert "+0.80 [+0.10, +1.50] \\*" in text
    assert [above for above, _ in cells(made.teacher, made)][:2] == ["teacher", "90.00"]


@pytest.mark.parametrize("value,text", [(999, "999 "), (1000, "1 k"), (999_600, "1 M"), (4.09e9, "4.09 G")])
def test_quantities(value, text):
    assert quantity(value) == text


def test_a_timm_model_is_a_teacher_like_its_export(place):
    """`timm:` takes whatever timm opens, and an export of ours is such a folder."""
    name = f"timm:local-dir:{place}/teacher/export"
    made = compare(
        f"big={name}", [f"own={place}/teacher"], Manifest.load(place / "val"), workers=0, rounds=1, threads=1
    )
    (own,) = made.students
    assert own.runs[0]["agreement"] == 100 and own.runs[0]["kl"] < 1e-9
    assert made.teacher.cost.parameters == own.cost.parameters
    assert made.teacher.runs[0]["top1"] == own.runs[0]["top1"]


def test_adopted_classifiers_answer_as_timm_does(tmp_path):
    import timm

    for name in ("test_vit", "test_resnet", "test_efficientnet", "test_convnext"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10).eval()
        timm.models.save_for_hf(
            model, str(tmp_path / name), model_config={"label_names": list(CLASSES), "num_classes": 10}
        )
        ours = load_classifier(adopt(f"timm:local-dir:{tmp_path / name}", tmp_path / f"{name}-export"))
        side = model.pretrained_cfg["input_size"][-1]
        images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        torch.testing.assert_close(ours(images), model(ours.backbone.normalize(images)), rtol=1e-4, atol=1e-5)
        assert ours.classes == CLASSES and ours.preprocessing["crop_pct"] == model.pretrained_cfg["crop_pct"]


def test_classifiers_that_cannot_be_adopted_are_told(tmp_path):
    with pytest.raises(InputError, match="timm's resnet_none cannot be had"):
        adopt("timm:resnet_none", tmp_path / "x")
