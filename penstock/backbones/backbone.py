"""A timm model as the rest of Penstock sees it: uint8 images in, pooled and spatial features out."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from penstock import distributed
from penstock.backbones import names
from penstock.backbones.attention import choose_attention
from penstock.errors import InputError
from penstock.recipe import Block

if TYPE_CHECKING:
    from penstock.backbones.weights import Report

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COARSE = 32  # pixels; sizes of large images that follow a curve are multiples of it, so that there are few
log = logging.getLogger(__name__)

# timm arguments that Backbone.Config's own fields set.
_OWN = {"img_size": "size", "in_chans": "channels", "global_pool": "pool", "num_classes": None, "pretrained": "weights"}


class Features(NamedTuple):
    """What a backbone says about B images."""

    pooled: Tensor  # [B, dim]
    spatial: Tensor  # patch tokens [B, L, D], without class or register tokens, or a map [B, C, h, w]
    prefix: Tensor | None = None  # class, distillation and register tokens [B, P, D], of networks of tokens
    stages: tuple[Tensor, ...] = ()  # maps [B, C, h, w] by depth, as many of the last ones as were asked for


class Backbone(nn.Module):
    """Any timm ViT or CNN.

    Attributes:
        model: the timm model, without a classifier.
        dim: width of the pooled features.
        spatial_dim: channels of the spatial features.
        kind: "tokens" or "map", the form of `Features.spatial`.
        patch: pixels (height, width) of a ViT's patch, None for other models.
        size: image (height, width) the model was made for; ViTs take others that their patch divides.
        mean, std: fp32 [channels], of images in [0, 1]; not part of the state dict.
        loaded: what became of the tensors of a file of weights, if one was loaded.
    """

    class Config(Block):
        name: str = Field(description="a timm model, such as vit_small_patch16_224 or resnet50")
        size: int | tuple[int, int] = Field(224, description="image side in pixels, or [height, width]")
        channels: int = Field(3, ge=1, description="channels of an image")
        options: dict[str, Any] = Field({}, description="timm's arguments: patch_size, embed_dim, depth, ...")
        weights: str | None = Field(
            None, description="'timm', an export folder, a .safetensors file, or a published .pth checkpoint"
        )
        match: float = Field(0.9, ge=0, le=1, description="least share of the tensors that a file of weights must hold")
        mean: tuple[float, ...] = Field(IMAGENET_MEAN, description="per channel, of images in [0, 1]; or one for all")
        std: tuple[float, ...] = Field(IMAGENET_STD, description="per channel, of images in [0, 1]; or one for all")
        pool: Literal["avg", "token"] | None = Field(
            None, description="pooled features: mean over patches, the class token, or as the model does"
        )

        @field_validator("name")
        @classmethod
        def _known(cls, name: str) -> str:
            names.facts(name)
            return name

        @field_validator("options")
        @classmethod
        def _not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
            for key in options.keys() & _OWN.keys():
                field = _OWN[key]
                raise ValueError(f"{key!r} is set by backbone.{field}" if field else f"{key!r} is always set here")
            return options

        @field_validator("std")
        @classmethod
        def _positive(cls, std: tuple[float, ...]) -> tuple[float, ...]:
            if any(value <= 0 for value in std):
                raise ValueError("a standard deviation must be above 0")
            return std

        @model_validator(mode="after")
        def _fits(self) -> "Backbone.Config":
            height, width = self.height_width
            if min(height, width) < 1:
                raise ValueError(f"size: {self.size} must be positive")
            patch = names.patch_of(self.name, self.options) if names.takes_any_size(self.name) else None
            if patch and (height % patch[0] or width % patch[1]):
                near = [max(round(side / p), 1) * p for side, p in zip((height, width), patch, strict=True)]
                raise ValueError(
                    f"size: the patch {patch} does not divide the size {height} x {width}; {near} would do"
                )
            for field, values in (("mean", self.mean), ("std", self.std)):
                if len(values) not in (1, self.channels) and values not in (IMAGENET_MEAN, IMAGENET_STD):
                    raise ValueError(
                        f"{field}: {len(values)} values for {self.channels} channels; give one, or one each"
                    )
            return self

        @property
        def height_width(self) -> tuple[int, int]:
            return (self.size, self.size) if isinstance(self.size, int) else self.size

        def per_channel(self, values: tuple[float, ...]) -> list[float]:
            """A value for every channel; given for another number of channels, their average is repeated."""
            return list(values) if len(values) == self.channels else [sum(values) / len(values)] * self.channels

    mean: Tensor
    std: Tensor

    def __init__(self, config: "Backbone.Config"):
        super().__init__()
        self.config = config
        self.model: Any = _create(config)  # an nn.Module with timm's methods
        self.size = config.height_width
        self.loaded: Report | None = None
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(config.per_channel(values)), persistent=False)
        self._prefix = getattr(self.model, "num_prefix_tokens", 0)
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        self.kind: Literal["tokens", "map"] = "tokens"
        features = self._probe()
        self.dim = features.pooled.shape[1]
        self.kind = "tokens" if features.spatial.ndim == 3 else "map"
        self.spatial_dim = features.spatial.shape[2 if self.kind == "tokens" else 1]
        choose_attention(
            self.model, features.spatial.shape[1] if self.kind == "tokens" else features.spatial[0, 0].numel()
        )
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        self.patch: tuple[int, int] | None = tuple(patch) if patch is not None and self.kind == "tokens" else None
        if config.weights not in (None, "timm"):
            from penstock.backbones.weights import load_weights

            self.loaded = load_weights(self.model, Path(str(config.weights)).expanduser(), self.size, config.match)
        self._compare_normalization()

    @property
    def size_multiple(self) -> int:
        """What sizes that follow a curve are rounded to, in pixels: the patch, or few sizes for other networks."""
        if self.patch:
            return max(self.patch)
        return COARSE if min(self.size) >= 4 * COARSE else COARSE // 8

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to fp32: (images / 255 - mean) / std, in one pass: a multiplication and an addition."""
        scale = 1 / (255 * self.std.float())
        return torch.addcmul((-self.mean.float() / self.std)[:, None, None], images, scale[:, None, None])

    def forward(self, images: Tensor, stages: int = 0) -> Features:
        """Features of uint8 images, or of float images that are normalised already, [B, C, H, W].

        Args:
            stages: how many maps to give as well: of the last stages of a CNN, the last blocks of a ViT.
        """
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        if self.kind == "map":
            # Convolutions are a fifth to a third faster, on CPUs and on tensor cores, and hand the layout on. Weights
            # stay as they are: DeepSpeed cannot broadcast them otherwise, and ZeRO would lay them out flat again.
            images = images.contiguous(memory_format=torch.channels_last)
        images = images.to(next(self.model.parameters()).dtype)
        hidden, maps = features_and_stages(self.model, images, stages)
        pooled = self.model.forward_head(hidden, pre_logits=True)
        if hidden.ndim == 3:
            return Features(pooled, hidden[:, self._prefix :], hidden[:, : self._prefix], maps)
        return Features(pooled, hidden.permute(0, 3, 1, 2) if self._channels_last else hidden, None, maps)

    def _compare_normalization(self) -> None:
        """Warn where the weights say that they were trained on images of another mean and standard deviation."""
        from penstock.backbones.weights import CONFIG_FILE, read_config

        file = Path(str(self.config.weights)).expanduser() / CONFIG_FILE
        said: dict[str, Any] = {}
        if self.config.weights == "timm":
            said = dict(self.model.pretrained_cfg)
        elif self.config.weights is not None and file.is_file():
            said = read_config(file).get("pretrained_cfg", {})
        for name, own in (("mean", self.mean), ("std", self.std)):
            theirs = list(said.get(name) or [])
            other = len(theirs) == len(own) and not torch.allclose(own, torch.tensor(theirs), atol=1e-3)
            if other and distributed.is_main():
                log.warning(
                    "backbone.%s is %s, but %s was trained with %s; set backbone.%s='%s', unless this is meant",
                    name, [round(value, 4) for value in own.tolist()], self.config.weights, theirs, name, theirs,
                )  # fmt: skip

    def _probe(self) -> Features:
        """The shapes of features, computed on the meta device: no arithmetic is done."""
        state = {name: value.to("meta") for name, value in [*self.named_parameters(), *self.named_buffers()]}
        images = torch.empty(1, self.config.channels, *self.size, device="meta")
        self.eval()
        try:
            with torch.no_grad():
                return torch.func.functional_call(self, state, (images,))
        except (TypeError, AttributeError, RuntimeError, AssertionError) as error:
            raise InputError(
                f"{self.config.name} does not give features for images of {self.size[0]} x {self.size[1]}: {error}; "
                "choose another backbone.size, or a model with one feature map or one sequence of tokens"
            ) from error
        finally:
            self.train()


def features_and_stages(model: Any, images: Tensor, stages: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What a timm model's `forward_features` gives, and maps [B, C, h, w] of its last `stages` stages or blocks.

    Raises:
        InputError: it has fewer, or does not show them.
    """
    if stages == 0:
        return model.forward_features(images), ()
    try:
        hidden, maps = model.forward_intermediates(images, indices=stages, norm=False, output_fmt="NCHW")
    except (AttributeError, AssertionError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__} does not show maps of its last {stages} stages ({error or 'it has fewer'}); "
            "ask for fewer, or take a loss that needs none"
        ) from error
    return hidden, tuple(maps)


def _create(config: Backbone.Config) -> Any:
    import timm

    arguments = dict(config.options)
    if names.takes_any_size(config.name):
        arguments.setdefault("dynamic_img_size", True)
    arguments = timm.models.resolve_model_input_args(
        config.name, args={"input_size": (config.channels, *config.height_width)}, **arguments
    )
    try:
        model = timm.create_model(pretrained=config.weights == "timm", num_classes=0, **arguments)
    except TypeError as error:
        raise InputError(f"backbone.options do not fit {config.name}: {error}") from error
    except (AssertionError, ValueError) as error:
        raise InputError(f"timm cannot make {config.name} with {config.options}: {error}") from error
    except RuntimeError as error:  # weights that lack a part which the options add
        if config.weights != "timm":
            raise
        raise InputError(
            f"timm's weights of {config.name} do not fit the options {config.options}: {error}; give their file, whose "
            "missing tensors are reported, or take out options"
        ) from error
    except OSError as error:
        raise InputError(f"timm's weights of {config.name} cannot be fetched: {error}; give a local file") from error
    return _with_pool(model, config)


def _with_pool(model: Any, config: Backbone.Config) -> Any:
    # timm's reset_classifier changes the pooling alone; global_pool at creation would also move the last norm.
    if config.pool is None or getattr(model, "global_pool", None) == config.pool:
        return model
    try:
        model.reset_classifier(0, global_pool=config.pool)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"backbone.pool={config.pool!r} does not fit {config.name}: {error or 'no such pooling'}"
        ) from error
    return model
