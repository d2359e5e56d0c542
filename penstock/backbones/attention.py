"""Which of timm's two implementations of attention a model uses."""

from typing import Any

from torch import nn

from penstock import distributed

# Tokens up to which a table of probabilities is small enough to be kept for the backward pass.
SHORT = 600


def choose_attention(module: nn.Module, tokens: int) -> None:
    """On a CPU, compute attention over short sequences as plain matrix products.

    There the backward pass of torch's fused kernel takes two to five times as long in bf16 (torch 2.15: 29 ms against
    11 for 4 x 12 heads of 197 x 64; 2.9 against 0.5 for 16 x 3 of 17 x 64), and as long in fp32.
    """
    if distributed.device().type == "cpu" and tokens <= SHORT:
        part: Any
        for part in module.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
