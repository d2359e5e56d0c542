"""Whether features still tell images apart: their spread, their effective rank, and alarms in plain words."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Untrained networks, whose features share a large common direction, show a spread of 0.03 to 0.1 and ranks above 5.
LEAST_SPREAD, LEAST_RANK, NEAR_COLLAPSE = 0.01, 3.0, 0.01


def feature_health(features: Tensor) -> dict[str, float]:
    """Figures of features [n, D] of n different images.

    `std` is the standard deviation of the L2-normalised features, mean over dimensions; `spread` is `std` as a share
    of its ideal 1 / sqrt(D), so 1 is spread evenly over the sphere and 0 collapsed to a point. `effective_rank` is the
    exponential of the entropy of the singular values (RankMe, Garrido et al. 2023), from 1 to min(n, D); of the
    centred features, since a common offset, large in untrained networks, would hide everything else. Features that
    are not finite give nan.
    """
    wide = features.double()
    if not bool(wide.isfinite().all()):
        return {"std": torch.nan, "spread": torch.nan, "effective_rank": torch.nan}
    std = F.normalize(wide, dim=1).std(dim=0, correction=0).mean().item()
    wide = wide - wide.mean(0)
    gram = wide.T @ wide if len(wide) > wide.shape[1] else wide @ wide.T  # the smaller one
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    rank = torch.special.entr(share).sum().exp().item()
    return {"std": std, "spread": std * wide.shape[1] ** 0.5, "effective_rank": rank}


def alarms(
    health: dict[str, float], dim: int, loss: float | None = None, collapse_loss: float | None = None
) -> list[str]:
    """What is wrong, and what to try, one sentence each; empty when all is well.

    Args:
        health: from `feature_health`.
        dim: width of the features.
        loss, collapse_loss: the recent training loss, and the loss of a network that ignores its input
            (`Task.collapse_loss`), where known.
    """
    found = []
    spread, rank = health["spread"], health["effective_rank"]
    if spread != spread:
        found.append("features are not finite: the network has diverged; try a lower learning rate or longer warm-up")
    elif spread < LEAST_SPREAD:
        found.append(
            f"features have collapsed: every image gives nearly the same vector (spread {spread:.2g}, where 1 is ideal "
            "and 0 a single point); try a lower learning rate, a longer warm-up, or for contrastive methods a larger "
            "batch or another temperature"
        )
    elif rank < LEAST_RANK:
        found.append(
            f"features fill few directions: an effective rank of {rank:.1f} in {dim} dimensions; try stronger "
            "augmentation, a higher mask ratio, or less weight decay"
        )
    if loss is not None and collapse_loss is not None and loss > (1 - NEAR_COLLAPSE) * collapse_loss:
        found.append(
            f"the loss {loss:.4g} is that of a network which ignores its input ({collapse_loss:.4g}); soon after the "
            "start this is normal, later it means that nothing is learned: try another learning rate, or check the data"
        )
    return found
