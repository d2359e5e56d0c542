"""What a file of any form says of itself: classes, preprocessing, temperature, and the weights it was made from."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from penstock.augment.resize_crop import ResizeCrop
from penstock.errors import InputError
from penstock.recipe import Block

KEY = "penstock"  # of ONNX's metadata; `penstock.json` among the extra files of torch.export
REMEDY = "make it again with `penstock export`"


class Preprocessing(Block):
    """How an image becomes the network's input; normalisation is inside the network."""

    size: tuple[int, int] = Field(description="height and width in pixels")
    channels: int = Field(ge=1)
    crop_pct: float = Field(description="the short side is resized to size / crop_pct, then the centre is cut out")
    interpolation: Literal["bilinear", "bicubic"] = Field(description="antialiased")
    mean: tuple[float, ...] = Field(description="of images in [0, 1], by channel; already in the network")
    std: tuple[float, ...]

    def augment(self, size: int | None = None) -> ResizeCrop:
        """The same preparation as in evaluation.

        Args:
            size: pixels, in the place of the network's own.

        Raises:
            InputError: the images are not square, or have a number of channels that no image file has.
        """
        height, width = self.size
        if size is None and height != width:
            raise InputError(f"the network takes images of {height} x {width}, but images are prepared as squares")
        if self.channels not in (1, 3):
            raise InputError(f"the network takes images of {self.channels} channels, and image files give 1 or 3")
        options = {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        return ResizeCrop(ResizeCrop.Config(size=height if size is None else size, **options))


class About(Block):
    """The document inside a file."""

    version: Literal[1] = 1
    classes: tuple[str, ...] | None = Field(description="in the order of the logits; None for a backbone alone")
    temperature: float = Field(1.0, gt=0, description="what logits are divided by for calibrated probabilities")
    preprocessing: Preprocessing
    weights: dict[str, str] = Field(description="SHA-256 of the weights it was made from, by the name of their file")
    folded: int = Field(0, description="batch norms folded into the layers before them")

    def text(self) -> str:
        return self.model_dump_json()

    @classmethod
    def read(cls, text: str | None, where: Any) -> "About":
        """The inverse of `text`; `where` is the file, for the error."""
        if text is None:
            raise InputError(f"{where} was not written by `penstock export`: it says nothing of classes and images")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{where} describes itself in a way unknown here ({place}: {first['msg']}); {REMEDY}"
            ) from error
