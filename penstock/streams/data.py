"""The `data:` block of a recipe."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from penstock.errors import InputError
from penstock.recipe import Block
from penstock.streams.extras import check_names, check_present
from penstock.streams.positions.mixture import Train, check_sets, open_part, open_reader, open_sets, places_of
from penstock.streams.positions.part import LabelShare
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.remote.options import Remote
from penstock.streams.sets.storage import Address, is_remote


class Data:
    """The packed sets a recipe names, opened once."""

    class Config(Block):
        train: Train = Field(
            description="folder or address of the packed training set (`penstock shards pack`), or several sets by "
            "names of yours: {photos: {set: data/photos, weight: 3}, sketches: {set: data/sketches}}"
        )
        val: Address | None = Field(None, description="folder or address of the packed validation set")
        labels: LabelShare | None = Field(
            None, description="train on a fixed share, '10%' or '4 per class'; null is all"
        )
        repeats: int = Field(1, ge=1, description="times a sample is served in a row, augmented anew each time")
        pool: int | None = Field(
            None, ge=1, description="views that each sample has in all, served in turn; null augments anew without end"
        )
        channels: Literal[1, 3] = Field(3, description="3 decodes to RGB, 1 to greyscale")
        workers: int = Field(2, ge=0, description="decoding processes per rank; 0 decodes in the training process")
        prefetch: int = Field(4, ge=1, description="micro-batches each worker prepares ahead")
        cache: Literal["none", "ram"] = Field("none", description="ram keeps decoded images, for sets that fit")
        decode: Literal["smaller", "whole"] = Field(
            "smaller", description="smaller: large JPEGs at 1/2, 1/4 or 1/8 where no view needs more"
        )
        extra: dict[str, str] = Field(
            {}, description="members handed over beside the views, suffix by name: {caption: txt, boxes: json}"
        )
        stages: list[str] = Field(
            [],
            description="own functions, package.module:name, from an iterator of samples to one; run in the workers, "
            "for evaluations during a run, too",
        )
        max_bad: float = Field(0.001, ge=0, le=1, description="share of unreadable samples above which a run stops")
        ledger: bool = Field(False, description="record every sample consumed in the run folder")
        remote: Remote = Field(Remote(), description="how sets are read from addresses such as s3://BUCKET/PREFIX")
        lanes: int = Field(64, ge=1, description="places of the data read side by side; best a multiple of the ranks")
        block: int = Field(256, ge=1, description="most neighbouring samples that stay together in an epoch's order")
        window: int = Field(4096, ge=1, description="samples shuffled among each other within a lane")

        @field_validator("extra")
        @classmethod
        def _members(cls, wanted: dict[str, str]) -> dict[str, str]:
            check_names(wanted)
            return wanted

        @field_validator("stages")
        @classmethod
        def _found(cls, addresses: list[str]) -> list[str]:
            if addresses:  # what reads samples is not loaded for recipes without
                from penstock.streams.stages import resolve

                for address in addresses:
                    resolve(address)
            return addresses

        @field_validator("train")
        @classmethod
        def _sets(cls, train: Any) -> Any:
            if isinstance(train, dict):
                check_sets(train)
            _load_if_here([address for _, address in places_of("", train)], lambda: open_sets(train))
            return train

        @field_validator("val")
        @classmethod
        def _packed(cls, val: str | None) -> str | None:
            if val is not None:
                _load_if_here([val], lambda: Manifest.load(val))
            return val

        @model_validator(mode="after")
        def _has_members(self) -> "Data.Config":
            def look() -> Manifest:
                found = open_sets(self.train)
                check_present(open_reader(found), self.extra)
                return found

            if self.extra:
                _load_if_here([address for _, address in places_of("", self.train)], look)
            return self

        def places(self) -> Iterator[tuple[str, str]]:
            """(key of the recipe, address) of every set."""
            yield from places_of("data.train", self.train)
            if self.val is not None:
                yield "data.val", self.val

    def __init__(self, config: "Data.Config", seed: int = 0):
        self.config = config
        self.train = open_sets(config.train, remote=config.remote)
        self.part = open_part(open_reader(self.train), config.labels, seed, config.repeats)
        self.val = Manifest.load(config.val, config.remote) if config.val is not None else None


def _load_if_here(addresses: list[str], load: Callable[[], Manifest]) -> None:
    """Look at sets that lie in folders of this machine; a login node need not have them."""
    if all(not is_remote(address) and Path(address).exists() for address in addresses):
        try:
            load()
        except InputError as error:
            raise ValueError(str(error).removeprefix("data.")) from error
