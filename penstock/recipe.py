"""A recipe: YAML merged by OmegaConf, checked by pydantic models that sit inside the components they configure."""

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """Base of every component's `Config`: unknown keys are errors, values do not change, defaults are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)
