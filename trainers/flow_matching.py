"""Flow matching on given pairs: regress the velocity of the straight line from image to noise.

Lipman et al. 2022 (arXiv 2210.02747); times as in "The Coupling Within" (arXiv 2603.09014).
t = 0 is the image, t = 1 is the noise.
"""

import torch
from torch import Tensor, nn

from nfm.trainers.training.randomness import Randomness


def sample_times(random: Randomness) -> Tensor:
    """Logit-normal times [B] in (0, 1), one for each record: sigmoid(n), n ~ Normal(-0.2, 1)."""
    return torch.sigmoid(random.normal() - 0.2)


def interpolate(image: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) image + t noise: each pair [B, ...] at its own time t [B]."""
    t = t.view(-1, *[1] * (image.ndim - 1))
    return (1 - t) * image + t * noise


def loss(
    model: nn.Module,
    image: Tensor,
    noise: Tensor,
    label: Tensor,
    random: Randomness,
    label_drop: float = 0.1,
) -> Tensor:
    """|| g(x_t, t, c) - (noise - image) ||^2, a scalar: the mean over pairs and dimensions.

    image, noise: float32 [B, ...]; label: int64 [B], each dropped (-1) with probability `label_drop`.
    """
    t = sample_times(random).to(image)
    dropped = random.uniform() < label_drop
    label = label.masked_fill(dropped.to(label.device), -1)
    velocity = model(interpolate(image, noise, t), t, label)
    return (velocity - (noise - image)).square().mean()
