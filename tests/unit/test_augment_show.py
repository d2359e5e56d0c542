"""`penstock augment show`: its views are those that training serves, and the sheet shows them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from penstock.augment import AUGMENTATIONS
from penstock.augment._sheet import CELL, LINE, MARGIN, Cell, draw_sheet
from penstock.augment._views import Shown, Viewer
from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG
from penstock.mixing import Mixing
from penstock.recipe import Source, check
from penstock.schedule import Clock
from penstock.streams.train import TrainStream
from tests.shards import damage, key_of, write_set

SAMPLES, BATCH = 24, 8
VIT = {
    "name": "vit_tiny_patch16_224",
    "size": 16,
    "options": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "weights": "on another machine",
}
GROWING = {"augment": {"name": "crop_flip", "size": {"name": "linear", "start": 8, "end": 16}}, "batch_growth": 3}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("stored"), [13, 11]).root


def values(folder: Path, **blocks: Any) -> dict[str, Any]:
    recipe = {
        "seed": 3,
        "duration": "4 epochs",
        "batch": BATCH,
        "data": {"train": str(folder), "val": "on another machine", "workers": 0},
        "augment": {
            "name": "standard",
            "policy": "randaugment",
            "size": {"name": "step", "start": 8, "milestones": ["50%"], "values": [16]},
            "strength": {"name": "linear", "start": 0.2, "end": 1.0},
        },
    }
    return recipe | blocks


def recipe_of(folder: Path, **blocks: Any) -> Shown:
    return check(Shown, Source(values=values(folder, **blocks)))


def trained(recipe: Shown, steps: int, samples: int = SAMPLES) -> dict[int, tuple[str, list[torch.Tensor]]]:
    """What a run on one process is served: position to key and views."""
    stream = TrainStream(
        recipe.data,
        AUGMENTATIONS.get(recipe.augment.name)(recipe.augment),
        batch=recipe.batch,
        accumulation=1,
        rank=0,
        world=1,
        seed=recipe.seed,
        clock=Clock.of(recipe.duration, recipe.batch, samples),
        size_multiple=4 if recipe.backbone else 1,
        growth=recipe.batch_growth,
    )
    served, batches = {}, stream.batches(since=0)
    for _ in range(steps):
        batch = next(batches)
        for row, position in enumerate(batch.positions.tolist()):
            served[position] = batch.keys[row], [view[row] for view in batch.views]
    return served


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"augment": {"name": "simclr", "size": 16}},
        {"backbone": VIT, **GROWING},
        {"data": {"repeats": 3}},
        {"data": {"labels": "1 per class", "repeats": 2}},
    ],
    ids=["curves", "two views", "growing", "repeats", "few labels"],
)
def test_the_views_are_those_of_training(stored, blocks):
    if "data" in blocks:
        blocks = {"data": {"train": str(stored), **blocks["data"]}}
    recipe = recipe_of(stored, **blocks)
    few = recipe.data.labels is not None
    viewer, served = Viewer(recipe), trained(recipe, 12, samples=10 if few else SAMPLES)
    epoch = 1 if "data" not in blocks else 0
    positions = viewer.first_positions(epoch, 5)
    servings = viewer.servings(positions, 3)
    assert list(servings) == positions and len(positions) == 5
    for position, places in servings.items():
        key = served[position][0]
        assert places[0] == position
        after = [place for place in sorted(served) if place >= position and served[place][0] == key]
        assert places[: len(after)] == after[:3] and len(places) == 3
        assert viewer.sample(position).key == key
        for place in places[: len(after)]:
            for view in viewer.views(place):
                expected = served[place][1][view.number].permute(1, 2, 0).numpy()
                assert np.array_equal(view.pixels, expected)


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_mixed_images_are_those_of_the_whole_batch(stored, mode, epoch):
    mix = {"mixup": 0.8, "cutmix": 1.0, "mode": mode}
    recipe = recipe_of(stored, mix=mix, augment={"name": "crop_flip", "size": 16})
    step = epoch * SAMPLES // BATCH
    served = trained(recipe, step + 1)
    whole = torch.arange(step * BATCH, (step + 1) * BATCH)
    images = torch.stack([served[position][1][0] for position in whole.tolist()]).float()
    labels = torch.tensor([int(served[position][0].removeprefix("sample")) % 10 for position in whole.tolist()])
    images, targets = Mixing(recipe.mix, recipe.seed)(
        images, F.one_hot(labels, 10).float(), whole, torch.ones(BATCH), mix | {"mix_prob": 1.0}, batch_key=step * BATCH
    )
    mixed = Viewer(recipe).mixed(epoch, 6)
    assert len(mixed) == 6
    for view, words in mixed:
        row = view.position - step * BATCH
        assert np.abs(view.pixels - images[row].permute(1, 2, 0).numpy()).max() <= 0.5
        for part in words:
            share, name = part.split()
            assert float(share) == pytest.approx(float(targets[row, int(name.removeprefix("class"))]), abs=0.0051)


def run(folder: Path, tmp_path: Path, *arguments: str, **blocks: Any) -> tuple[int, Path]:
    recipe, sheet = tmp_path / "recipe.yaml", tmp_path / "sheet.png"
    recipe.write_text(yaml.safe_dump(values(folder, **blocks)))
    return main(
        ["augment", "show", str(recipe), "--out", str(sheet), "--samples", "3", "--views", "4", *arguments]
    ), sheet


def test_the_sheet_shows_the_views(stored, tmp_path):
    code, path = run(stored, tmp_path, "--epoch", "1", backbone=VIT, method={"name": "mae"})
    assert code == DONE
    sheet = Image.open(path)
    assert sheet.size == (5 * (CELL + MARGIN) + MARGIN, 3 * (CELL + 2 * LINE + MARGIN) + MARGIN)
    viewer = Viewer(recipe_of(stored))
    servings = list(viewer.servings(viewer.first_positions(1, 3), 4).values())
    assert viewer.knobs(servings[0][0])["size"] == 8 and viewer.knobs(servings[0][3])["size"] == 16
    for row in range(3):
        for column in range(4):
            left, top = MARGIN + (column + 1) * (CELL + MARGIN), MARGIN + row * (CELL + 2 * LINE + MARGIN)
            (view,) = viewer.views(servings[row][column])
            side = len(view.pixels)
            cell = np.asarray(sheet)[top : top + CELL, left : left + CELL]
            assert np.array_equal(
                cell[CELL // side // 2 :: CELL // side, CELL // side // 2 :: CELL // side], view.pixels
            )


def test_overrides_and_mixing(stored, tmp_path):
    code, path = run(stored, tmp_path, "mix.mixup=0.8", "augment=none", "augment.size=8", mix={"mixup": 0.0})
    assert code == DONE
    assert Image.open(path).height == 5 * (CELL + 2 * LINE + MARGIN) + LINE + MARGIN + MARGIN


def test_greyscale_sets(stored, tmp_path):
    code, path = run(stored, tmp_path, data={"train": str(stored), "channels": 1})
    pixels = np.asarray(Image.open(path)).astype(int)
    assert code == DONE and (np.ptp(pixels, axis=2) == 0).all()


def test_what_cannot_be_read_is_said(tmp_path):
    manifest = write_set(tmp_path / "set", [SAMPLES])
    viewer = Viewer(recipe_of(manifest.root))
    position = viewer.first_positions(0, 1)[0]
    broken = viewer.sample(position).key
    damage(manifest, int(broken.removeprefix("sample")))
    viewer = Viewer(recipe_of(manifest.root))
    assert broken == key_of(int(broken.removeprefix("sample"))) and viewer.sample(position).image is None
    (view,) = viewer.views(position)
    assert view.pixels is None and view.reason
    code, path = run(manifest.root, tmp_path)
    assert code == DONE and path.is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epoch", "4"], "whose last epoch is number 3"),
        (["augment.policy=randaugmnet"], "augment.policy"),
        (["data.train=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_told(stored, tmp_path, capsys, arguments, words):
    code, path = run(stored, tmp_path, *arguments)
    assert code == INPUT_WRONG and not path.exists()
    assert words in capsys.readouterr().err


def test_a_sheet_of_odd_shapes(tmp_path):
    cells = [Cell(np.full((2, 9, 3), 7, np.uint8), ("a" * 80, "")), Cell(None, ("b", "c"), "reason " * 20)]
    draw_sheet(["heading", cells, cells[:1]], tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width == 2 * (CELL + MARGIN) + MARGIN
