"""How sets are read from an object store: the `data.remote` block of a recipe."""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from penstock.recipe import Block

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Remote(Block):
    mode: Literal["auto", "shards", "ranges"] = Field(
        "auto",
        description="what is fetched at once: shards, whole ones; ranges, blocks of neighbouring samples; auto, shards "
        "where the set fits into the cache",
    )
    cache_dir: Path | None = Field(None, description="the cache on disk; null is $PENSTOCK_CACHE or ~/.cache/penstock")
    cache_bytes: str | int = Field("64G", description="most that the cache may hold, for all runs of a machine")
    retries: int = Field(12, ge=0, description="times a request that failed is tried again, each after a longer pause")
    timeout: float = Field(60.0, gt=0, description="seconds without an answer or a byte until a request has failed")

    @field_validator("cache_bytes")
    @classmethod
    def _a_size(cls, value: str | int) -> str | int:
        parse_bytes(value)
        return value

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        named = self.cache_dir or os.environ.get("PENSTOCK_CACHE") or "~/.cache/penstock"
        return Path(named).expanduser().absolute()

    def settings(self) -> dict[str, Any]:
        """What a fetcher is started with, as plain values."""
        limits = {"retries": self.retries, "timeout": self.timeout}
        return {"folder": str(self.folder), "bytes": parse_bytes(self.cache_bytes), **limits}


def parse_bytes(value: str | int) -> int:
    """Bytes of 64G, 500M or a number. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is not a size; write 500M, 64G or a number of bytes")
    return int(float(match[1]) * UNITS[match[2].upper()])
