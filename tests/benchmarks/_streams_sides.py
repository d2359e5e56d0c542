"""Penstock's stream and the loaders that its own dependencies bring, each as an endless iterator of batch sizes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import simplejpeg
import torch
from torch import Tensor

from penstock.augment import AUGMENTATIONS
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.train import TrainStream
from tests.benchmarks._streams_data import Images

BATCH = 32
CROP: dict[str, Any] = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
LOCAL, GLOBALS, LOCALS = 96, 2, 6  # multi-crop: side of local views, and how many of each kind
GLOBAL_SHARE, LOCAL_SHARE = (0.4, 1.0), (0.05, 0.4)


def floor(images: Images, size: int) -> Iterator[int]:
    files = [file.read_bytes() for file in sorted(images.tree.rglob("*.jpg"))]
    while True:
        for data in files:
            simplejpeg.decode_jpeg(data, "GRAY", min_factor=8)
            yield 1


# Penstock


def _stream(images: Images, augment: Any, workers: int = 0, decode: str = "smaller") -> Iterator[Any]:
    data = Data.Config.model_validate({"train": images.packed, "workers": workers, "decode": decode})
    clock = Clock(total=1 << 40, batch=BATCH, epoch=images.count)
    stream = TrainStream(data, augment, batch=BATCH, accumulation=1, rank=0, world=1, seed=0, clock=clock)
    return stream.batches(0)


def _augment(name: str, **options: Any) -> Any:
    component: Any = AUGMENTATIONS.get(name)
    return component(component.Config(**options))


def _crop(size: int) -> Any:
    return _augment("crop_flip", size=size, interpolation="bilinear", **CROP)


def penstock(images: Images, size: int, **options: Any) -> Iterator[int]:
    return map(len, _stream(images, _crop(size), **options))


penstock_whole = partial(penstock, decode="whole")
penstock_worker = partial(penstock, workers=1)


def penstock_two(images: Images, size: int) -> Iterator[int]:
    plain = {"jitter": 0, "grayscale": 0, "blur": 0, "interpolation": "bilinear"}
    return map(len, _stream(images, _augment("simclr", size=size, **plain, **CROP)))


def penstock_multi(images: Images, size: int) -> Iterator[int]:
    plain = {"jitter": 0, "grayscale": 0, "blur": (0, 0, 0), "solarize": (0, 0, 0), "interpolation": "bilinear"}
    shares = {"scale": GLOBAL_SHARE, "local_scale": LOCAL_SHARE}
    sizes = {"size": size, "local_size": LOCAL, "global_views": GLOBALS, "local_views": LOCALS}
    return map(len, _stream(images, _augment("multi_crop", **sizes, **shares, **plain)))


def penstock_views(images: Images, size: int) -> Iterator[Tensor]:
    return (batch.views[0] for batch in _stream(images, _crop(size), workers=1))


# torchvision, webdataset, timm


def crop(size: int, scale: tuple[float, float] = CROP["scale"]) -> Any:
    """The same crop by torchvision: of a PIL image, or of a uint8 tensor."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale, CROP["ratio"], v2.InterpolationMode.BILINEAR, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )


def to_uint8(size: int, scale: tuple[float, float] = CROP["scale"]) -> Any:
    from torchvision.transforms import v2

    return v2.Compose([crop(size, scale), v2.PILToTensor()])


def endless(loader: Any) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise RuntimeError("the loader is empty")


def _folder(images: Images, transform: Callable[..., Any], workers: int = 0) -> Iterator[Any]:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(images.tree), transform)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return endless(loader)


def image_folder(images: Images, size: int, workers: int = 0) -> Iterator[int]:
    return (len(labels) for _, labels in _folder(images, to_uint8(size), workers))


def image_folder_floats(images: Images, size: int) -> Iterator[int]:
    """As torchvision's own examples go on: normalised floats, which Penstock leaves to the device."""
    from torchvision.transforms import v2

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    floats = v2.Compose([crop(size), v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.Normalize(mean, std)])
    return (len(labels) for _, labels in _folder(images, floats))


image_folder_worker = partial(image_folder, workers=1)


def folder_views(images: Images, size: int) -> Iterator[Tensor]:
    return (views for views, _ in _folder(images, to_uint8(size), workers=1))


def image_folder_two(images: Images, size: int) -> Iterator[int]:
    one = to_uint8(size)
    return (len(labels) for _, labels in _folder(images, lambda image: (one(image), one(image))))


def image_folder_multi(images: Images, size: int) -> Iterator[int]:
    crops = [to_uint8(size, GLOBAL_SHARE)] * GLOBALS + [to_uint8(LOCAL, LOCAL_SHARE)] * LOCALS
    return (len(labels) for _, labels in _folder(images, lambda image: tuple(one(image) for one in crops)))


def webdataset(images: Images, size: int) -> Iterator[int]:
    import webdataset as wds

    shards = [str(path) for path in sorted(images.packed.glob("*.tar"))]
    dataset = wds.WebDataset(shards, shardshuffle=False).shuffle(100).decode("pil").to_tuple("jpg;png", "cls")
    batches = dataset.map_tuple(to_uint8(size), int).batched(BATCH)
    return (len(labels) for _, labels in endless(batches))


def timm(images: Images, size: int) -> Iterator[int]:
    """Without its conversion to normalised floats, which Penstock leaves to the device, too."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(images.tree), is_training=True)
    options: dict[str, Any] = {
        "is_training": True,
        "interpolation": "bilinear",
        "color_jitter": None,
        "hflip": 0.5,
        **CROP,
    }
    loader = create_loader(
        dataset, (3, size, size), BATCH, num_workers=0, persistent_workers=False, device=torch.device("cpu"), **options
    )
    return (len(labels) for _, labels in endless(loader.loader))


# A training step, to wait for data in


def training_step(size: int) -> Callable[[Tensor], None]:
    """Forward, backward and SGD of a ViT-Ti/16 on uint8 [B, 3, size, size]."""
    from timm import create_model

    model = create_model("vit_tiny_patch16_224", img_size=size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(views: Tensor) -> None:
        loss = model(views.float() / 127.5 - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
