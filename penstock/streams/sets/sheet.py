"""A picture of some of a set's images with their labels, for people to look at before they train."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from penstock.errors import InputError
from penstock.splitmix import permutation
from penstock.streams.decode import DecodeError, decode
from penstock.streams.sets.atomic import replacing
from penstock.streams.sets.index import load_records
from penstock.streams.sets.manifest import Manifest

CELL, CAPTION, MARGIN = 112, 16, 6  # pixels
PAPER, INK, FAINT = "white", "black", "#b00020"


def draw_sheet(manifest: Manifest, path: Path, count: int = 64) -> None:
    """Write a PNG of `count` images of the set, always the same ones, in order of label. Damaged ones are said so."""
    cells = sorted(_chosen(manifest, count), key=lambda cell: cell[:2])
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height = CELL + MARGIN, CELL + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for place, (label, _, data) in enumerate(cells):
        left, top = MARGIN + place % columns * width, MARGIN + place // columns * height
        draw.text((left, top + CELL), _fitting(manifest.class_name(label), font), INK, font)
        try:
            image = _thumbnail(data)
        except DecodeError:
            draw.text((left, top + CELL // 2), "does not decode", FAINT, font)
            continue
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
    try:
        with replacing(path) as file:
            sheet.save(file, "PNG")
    except OSError as error:
        raise InputError(f"the sheet cannot be written to {path}: {error.strerror}; give another path") from None


def _chosen(manifest: Manifest, count: int) -> list[tuple[int, str, bytes]]:
    """(label, key, image bytes) of samples spread over the set."""
    places = sorted(permutation(manifest.samples, 0)[:count].tolist())
    found, first = [], 0
    for shard in manifest.shards:
        mine = [place - first for place in places if first <= place < first + shard.samples]
        first += shard.samples
        if not mine:
            continue
        records = manifest.storage.local(shard.index, shard.index_sha256, load_records)
        for record in records[mine]:
            data = manifest.storage.read(shard.name, int(record["offset"]), int(record["size"]))
            found.append((int(record["label"]), record["key"].decode(), data))
    return found


def _thumbnail(data: bytes) -> Image.Image:
    """Scaled to fit a cell: small images enlarged with hard pixels, so that what is stored is seen."""
    image = Image.fromarray(decode(data))
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text cut to the width of a cell."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "...") > CELL:
        text = text[:-1]
    return text + "..."
