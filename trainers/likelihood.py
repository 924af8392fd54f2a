"""The teacher's training: maximum likelihood of noisy images, x + eta eps (TarFlow, arXiv 2412.06329)."""

from __future__ import annotations

import torch
from torch import Tensor

from nfm.trainers.models.tarflow import TarFlow, nll_per_dim
from nfm.trainers.training.randomness import Randomness


def loss(
    model: TarFlow,
    image: Tensor,
    label: Tensor,
    random: Randomness,
    eta: float,
    label_drop: float = 0.1,
    flips: bool = False,
) -> Tensor:
    """Nats a dimension without the constant log(2 pi)/2, the mean over the batch.

    image: float32 [B, C, H, W] in [-1, 1], with `flips` each mirrored with probability 1/2; label: int64 [B], each
    dropped (-1) with probability `label_drop`.
    """
    if flips:
        image = torch.where(random.uniform(1, 1, 1) < 0.5, image.flip(-1), image)
    eps = random.normal(*image.shape[1:])
    label = torch.where(random.uniform() < label_drop, -1, label)
    return nll_per_dim(*model.encode(image + eta * eps, label)).mean()
