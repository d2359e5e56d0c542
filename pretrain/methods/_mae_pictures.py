"""Sheets of original, masked and reconstructed images, for people."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, TITLE = 6, 20  # pixels
SMALLEST = 128  # pixels of a picture's shorter side; small images are enlarged without smoothing
BACKGROUND, INK = (255, 255, 255), (0, 0, 0)


def visible_statistics(patches: Tensor, order: Tensor, kept: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of hidden patches, guessed from visible ones: [B, M, 1] each.

    Visible patches count by the inverse square of their distance, so the guess uses no hidden pixel.

    Args:
        patches: [B, L, values]; only the visible ones are looked at.
        order: int64 [B, L], places of the `kept` visible patches, then of the M hidden ones.
    """
    places = torch.stack([order // grid[1], order % grid[1]], dim=-1).float()
    near = torch.cdist(places[:, kept:], places[:, :kept]).pow(-2)  # never 0: a patch is hidden or visible
    near = near / near.sum(dim=-1, keepdim=True)
    seen = patches.gather(1, order[:, :kept, None].expand(-1, -1, patches.shape[-1]))
    std, mean = torch.std_mean(seen, dim=-1, keepdim=True)
    return near @ mean, near @ std


def sheet(columns: dict[str, Tensor]) -> Tensor:
    """One row per image, one titled column per version of it: uint8 [3, height, width].

    Args:
        columns: by title, images in [0, 1], float [B, C, H, W]; 1 or 3 channels, of others the first three or one.
    """
    font = ImageFont.load_default(size=13)
    height, width = next(iter(columns.values())).shape[-2:]
    factor = max(1, -(-SMALLEST // min(height, width)))
    wide = max(width * factor, *(int(font.getlength(title)) for title in columns)) + MARGIN
    high = height * factor + MARGIN
    rows = len(next(iter(columns.values())))
    page = Image.new("RGB", (wide * len(columns) + MARGIN, TITLE + high * rows + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(page)
    for column, (title, images) in enumerate(columns.items()):
        left = MARGIN + column * wide
        draw.text((left, 3), title, fill=INK, font=font)
        for row, image in enumerate(_rgb(images)):
            picture = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            page.paste(picture, (left, TITLE + row * high))
    return torch.from_numpy(np.array(page)).permute(2, 0, 1).contiguous()


def _rgb(images: Tensor) -> np.ndarray:
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
