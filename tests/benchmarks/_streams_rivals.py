"""Loaders that penstock does not depend on. Each raises ImportError where it is not installed."""

from collections.abc import Iterator
from typing import Any

import torch

from tests.benchmarks._streams_data import Images
from tests.benchmarks._streams_sides import BATCH, CROP, crop, endless, to_uint8


def _files(images: Images) -> list[tuple[str, int]]:
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(images.tree)).samples


def litdata(images: Images, size: int) -> Iterator[int]:
    """Its JPEG type decodes with torchvision to tensors."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter
    from PIL import Image

    folder = images.work / "litdata"
    if not folder.exists():
        writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
        for number, (path, label) in enumerate(_files(images)):
            writer.add_item(number, {"image": Image.open(path), "label": label})
        writer.done()
        writer.merge()
    transform = crop(size)

    class Cropped(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            item = super().__getitem__(index)
            return transform(item["image"]).expand(3, -1, -1), item["label"]  # greyscale files stay so

    loader: Any = StreamingDataLoader(Cropped(str(folder), shuffle=True), batch_size=BATCH, num_workers=0)
    return (len(labels) for _, labels in endless(loader))


def mosaic(images: Images, size: int) -> Iterator[int]:
    from streaming import MDSWriter, StreamingDataset

    folder, transform = images.work / "mosaic", to_uint8(size)
    if not folder.exists():
        from PIL import Image

        with MDSWriter(out=str(folder), columns={"image": "jpeg", "label": "int"}) as writer:
            for path, label in _files(images):
                writer.write({"image": Image.open(path), "label": label})

    class Cropped(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            item = super().__getitem__(index)
            return transform(item["image"].convert("RGB")), item["label"]

    dataset = Cropped(local=str(folder), shuffle=True, batch_size=BATCH)
    loader: Any = torch.utils.data.DataLoader(dataset, BATCH, num_workers=0)
    return (len(labels) for _, labels in endless(loader))


def dali(images: Images, size: int) -> Iterator[int]:
    """Decodes the crop alone. Nothing runs ahead, so that its time is not counted to others."""
    from nvidia.dali import fn, pipeline_def, types

    files = _files(images)

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False)
    def pipeline() -> Any:
        data, labels = fn.readers.file(
            files=[path for path, _ in files], labels=[label for _, label in files], random_shuffle=True
        )
        area, aspect = list(CROP["scale"]), list(CROP["ratio"])
        pixels = fn.decoders.image_random_crop(data, device="cpu", random_area=area, random_aspect_ratio=aspect)
        pixels = fn.resize(pixels, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        mirror = fn.random.coin_flip(probability=0.5)
        return fn.crop_mirror_normalize(pixels, mirror=mirror, dtype=types.UINT8, output_layout="CHW"), labels

    built = pipeline()
    built.build()
    while True:
        _, labels = built.run()
        yield len(labels)


def ffcv(images: Images, size: int) -> Iterator[int]:
    """Its resize is OpenCV's area interpolation, the only one it has."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    file = images.work / "images.beton"
    if not file.exists():
        fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
        DatasetWriter(str(file), fields, num_workers=1).from_indexed_dataset(ImageFolder(str(images.tree)))
    decoder = RandomResizedCropRGBImageDecoder((size, size), CROP["scale"], CROP["ratio"])
    pipelines = {
        "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage(channels_last=False)],
        "label": [IntDecoder(), ToTensor()],
    }
    loader = Loader(str(file), BATCH, num_workers=1, order=OrderOption.RANDOM, pipelines=pipelines)
    return (len(labels) for _, labels in endless(loader))
