"""What losses check of their knobs, and probabilities at a temperature."""

from typing import Any

from torch import Tensor

from penstock.schedule import bounds


def above_zero(knob: Any) -> Any:
    """A temperature that stays above 0 on its curve; a validator."""
    least = min(bounds(knob))
    if least <= 0:
        raise ValueError(f"a temperature must be above 0, and this one reaches {least:g}; set the end of its curve")
    return knob


def not_negative(knob: Any) -> Any:
    """A weight that stays at or above 0 on its curve; a validator."""
    least = min(bounds(knob))
    if least < 0:
        raise ValueError(f"a weight is not negative, and this one reaches {least:g}")
    return knob


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) [B, K]."""
    return (logits / temperature).log_softmax(1)
