"""Operations on uint8 pixels that several augmentations share. Draws come from Python's `random`."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.augment import Box, Whole

# ImageNet's colours in [0, 1]; their luma stands for them in greyscale images.
MEAN, STD, LUMA = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.299, 0.587, 0.114)


def mean_colour(channels: int) -> tuple[int, ...]:
    """ImageNet's mean colour in [0, 255], for 3 channels or 1."""
    mean = MEAN if channels == 3 else (sum(m * share for m, share in zip(MEAN, LUMA, strict=True)),)
    return tuple(round(255 * value) for value in mean)


def spread_of_colour(channels: int) -> tuple[float, ...]:
    """ImageNet's standard deviation in [0, 255], for 3 channels or 1."""
    return tuple(255 * value for value in (STD if channels == 3 else (sum(STD) / 3,)))


def planes(image: np.ndarray) -> Tensor:
    """[H, W, C] to [C, H, W] without a copy."""
    return torch.from_numpy(image).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """Antialiased, uint8 [C, H, W] to [C, height, width]."""
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode=interpolation, antialias=True)[0]


def cut(image: np.ndarray, box: Box, factor: int) -> Tensor:
    """A box of the whole image, taken from one decoded at 1 / factor of it, with edges at the nearest pixels.

    A side of at least factor * n is never left with fewer than n pixels.
    """
    top, left, height, width = box
    top, left, bottom, right = ((edge + factor // 2) // factor for edge in (top, left, top + height, left + width))
    return planes(image)[:, top:bottom, left:right]


def random_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Inception's crop (Szegedy et al. 2015): a share `scale` of the area, of aspect `ratio`, anywhere inside."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    # No box fitted: the largest central one of an allowed aspect, as torchvision takes it.
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_flip(
    image: np.ndarray,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
    flip: float,
    whole: Whole | None = None,
) -> Tensor:
    """A random box of the (whole) image, resized to [C, size, size] and mirrored with probability `flip`."""
    height, width, factor = whole or (*image.shape[:2], 1)
    box = random_box(height, width, scale, ratio)
    # Flipping the small crop is cheap; the box is uniform, so the order of the two does not matter.
    view = resize(cut(image, box, factor), size, size, interpolation)
    return view.flip(-1) if random.random() < flip else view


def padded_crop(
    image: np.ndarray,
    size: int,
    pad: int,
    padding: str,
    interpolation: str,
    flip: float,
    whole: Whole | None = None,
) -> Tensor:
    """The image with its short side resized to `size`, padded, and a square of `size` cut out anywhere.

    CIFAR's usual crop, and DeiT III's "simple random crop" (Touvron et al. 2022).

    Args:
        pad: pixels on each side; less than `size` where `padding` is "reflect".
        padding: "reflect" or "constant" (black).
        flip: probability of mirroring.
        whole: where `image` was decoded smaller.
    """
    height, width, factor = whole or (*image.shape[:2], 1)
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    resized = resize(cut(image, (0, 0, height, width), factor), tall, wide, interpolation)
    if pad:
        resized = F.pad(resized[None], (pad, pad, pad, pad), padding)[0]
    top, left = random.randint(0, tall + 2 * pad - size), random.randint(0, wide + 2 * pad - size)
    view = resized[:, top : top + size, left : left + size]
    return view.flip(-1) if random.random() < flip else view


def gaussian_blur(image: Tensor, sigma: float, kernel: int) -> Tensor:
    """Blur uint8 [C, H, W] with `kernel` taps (odd), edges reflected; two passes instead of one square kernel."""
    kernel = min(kernel, 2 * math.ceil(4 * sigma) + 1)  # further taps add less than a tenth of a grey level
    taps = torch.arange(kernel, dtype=torch.float32) - kernel // 2
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, kernel)
    pad = kernel // 2
    padded = F.pad(image[:, None].float(), (pad, pad, pad, pad), mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, weights), weights.view(1, 1, kernel, 1))
    return blurred.round().clamp(0, 255).to(torch.uint8)[:, 0]


def shift_hue(image: Tensor, shift: float) -> Tensor:
    """Turn the hue of uint8 RGB [3, H, W] by `shift` of the colour circle; value and chroma of HSV stay.

    The formula of torchvision's `adjust_hue` in half its time, by going back to RGB without HSV's six sectors.
    """
    pixels = image.float()
    red, green, blue = pixels
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    scale = 1 / chroma.clamp(min=1)
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    sector = hue + (6 * shift + torch.tensor([5.0, 3.0, 1.0])).view(3, 1, 1)
    sector -= 6 * (sector / 6).floor()  # remainder(6), which is several times slower
    return (value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1)).round().to(torch.uint8)
