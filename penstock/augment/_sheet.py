"""A picture of rows of images with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from penstock.errors import InputError
from penstock.streams.sets.atomic import replacing

CELL, LINE, MARGIN = 144, 15, 8  # pixels
PAPER, INK, FAULT = "white", "black", "#b00020"


@dataclass(frozen=True)
class Cell:
    """An image, or the words that stand in its place, over two lines of caption."""

    pixels: np.ndarray | None  # uint8 [H, W, 1 or 3]
    caption: tuple[str, str]
    fault: str = ""


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Row = Sequence[Cell] | str  # cells, or a heading


def draw_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG of `compose`."""
    sheet = compose(rows)
    try:
        with replacing(path) as file:
            sheet.save(file, "PNG")
    except OSError as error:
        raise InputError(f"the sheet cannot be written to {path}: {error.strerror}; give another path") from None


def compose(rows: Sequence[Row]) -> Image.Image:
    """The picture. Small images are enlarged with hard pixels, so that every one of them can be seen."""
    columns = max((len(row) for row in rows if not isinstance(row, str)), default=1)
    heights = [LINE + MARGIN if isinstance(row, str) else CELL + 2 * LINE + MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(12), MARGIN
    for row, height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            draw.text((MARGIN, top), row, INK, font)
        else:
            for column, cell in enumerate(row):
                _draw_cell(sheet, cell, MARGIN + column * (CELL + MARGIN), top, font)
        top += height
    return sheet


def _draw_cell(sheet: Image.Image, cell: Cell, left: int, top: int, font: Font) -> None:
    draw = ImageDraw.Draw(sheet)
    if cell.pixels is None:
        draw.text((left, top + CELL // 2), _fitting(cell.fault, font), FAULT, font)
    else:
        image = Image.fromarray(cell.pixels.squeeze(2) if cell.pixels.shape[2] == 1 else cell.pixels)
        scale = CELL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
    for line, text in enumerate(cell.caption):
        draw.text((left, top + CELL + line * LINE), _fitting(text, font), INK, font)


def _fitting(text: str, font: Font) -> str:
    """The text cut to the width of a cell."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "...") > CELL:
        text = text[:-1]
    return text + "..."
