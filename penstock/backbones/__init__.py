"""One small interface over timm: any ViT, any CNN.

`Backbone` and `Features` are imported when first used, so that `penstock.backbones.names` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.backbones.backbone import Backbone, Features

__all__ = ["Backbone", "Features"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from penstock.backbones import backbone

        return getattr(backbone, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
