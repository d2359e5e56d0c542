"""A small task for tests of the engine and the loop: two views through one encoder and one decoder."""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from penstock.streams.batch import Batch
from penstock.task import StepOutput, Task, weighted_mean

SHAPE = (1, 4, 4)


class Encoder(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 8))

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooled=self.model(images.flatten(1).to(self.model[0].weight.dtype) / 255))


class Toy(Task):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = Encoder()
        self.decoder = nn.Linear(8, 16)
        self.token = nn.Parameter(torch.full((8,), 0.1))
        self.register_buffer("centre", torch.zeros(16))

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        total = torch.zeros(len(batch))
        for view in batch.views:
            rebuilt = self.decoder(self.backbone(view).pooled + self.token).float()
            total = total + (rebuilt - view.flatten(1) / 255 - self.centre).pow(2).mean(1)
        if knobs.get("poison") and batch.weights.sum() and 3 in batch.labels:
            total = total * float("nan")
        return StepOutput(weighted_mean(total, batch.weights), batch.weights.sum(), {"mse": total.detach().mean()})


def toy_batch(positions: Tensor, bad: tuple[int, ...] = ()) -> Batch:
    """A batch that is a pure function of its positions, with weight 0 at the positions in `bad`."""
    views = []
    for view in range(2):
        rows = [torch.Generator().manual_seed(int(p) * 2 + view) for p in positions]
        views.append(torch.stack([torch.randint(0, 256, SHAPE, generator=g, dtype=torch.uint8) for g in rows]))
    weights = torch.tensor([0.0 if int(p) in bad else 1.0 for p in positions])
    return Batch(views, positions % 5, weights, positions, [str(int(p)) for p in positions])
