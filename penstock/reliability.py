"""Whether a classifier's confidence can be believed: accuracy beside confidence, as numbers and as a picture."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.errors import InputError

BINS = 15  # of Guo et al. 2017
SIZE, DPI = (4.8, 5.6), 100  # inches, pixels per inch
BLUE, RED, GREY = "#4477aa", "#ee6677", "#777777"


class Reliability(NamedTuple):
    """Samples by their confidence, in bins of equal width over [0, 1]; fp64 [bins] each, 0 in empty bins."""

    samples: Tensor  # their number
    confidence: Tensor  # mean confidence, in [0, 1]
    accuracy: Tensor  # share of right answers, in [0, 1]

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini et al. 2015; Guo et al. 2017), in [0, 1]: the mean gap over samples."""
        return self._mean((self.accuracy - self.confidence).abs())

    def _mean(self, values: Tensor) -> float:
        return ((values * self.samples).sum() / self.samples.sum()).item()


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Reliability:
    """Bins of the samples' confidence [n] in their answers, and of whether these are right [n].

    A bin holds its lower edge, and the last one 1 as well.
    """
    if len(confidence) == 0:
        raise InputError("there is no sample to measure calibration on; give a validation set that is not empty")
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    place = torch.bucketize(confidence, edges[1:-1], right=True)
    zeros = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    samples = zeros.index_add(0, place, torch.ones_like(confidence))
    filled = samples.clamp(min=1)
    return Reliability(
        samples,
        zeros.index_add(0, place, confidence) / filled,
        zeros.index_add(0, place, correct.double()) / filled,
    )


def reliability_diagram(bins: Reliability, title: str = "reliability") -> Tensor:
    """Accuracy of each bin, its gap to the confidence, and where the samples are: uint8 [3, height, width]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples, confidence, accuracy = (values.cpu().numpy() for values in bins)
    filled, width, total = samples > 0, 1 / len(samples), samples.sum()
    left = np.arange(len(samples))[filled] * width
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    bars = {"width": width, "align": "edge", "edgecolor": "white", "linewidth": 0.5}
    above.bar(left, accuracy[filled], color=BLUE, label="accuracy", **bars)
    gap = (confidence - accuracy)[filled]
    above.bar(left, gap, bottom=accuracy[filled], color=RED, alpha=0.35, label="gap to confidence", **bars)
    above.hlines(confidence[filled], left, left + width, color=RED, linewidth=1.5)
    above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
    above.set(title=f"{title}: ECE {100 * bins.error:.2f} %", ylabel="share of right answers", ylim=(0, 1))
    above.legend(loc="upper left", frameon=False)
    below.bar(left, 100 * samples[filled] / total, color=GREY, **bars)
    for name, colour, mean in (
        ("accuracy", BLUE, bins._mean(bins.accuracy)),
        ("confidence", RED, bins._mean(bins.confidence)),
    ):
        below.axvline(mean, color=colour, label=f"{name} {100 * mean:.1f} %")
    below.set(xlabel=f"confidence ({total:.0f} samples)", ylabel="% of samples", xlim=(0, 1))
    below.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1).contiguous()
