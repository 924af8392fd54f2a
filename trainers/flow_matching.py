"""Flow matching on given pairs: regress the velocity of the straight line from image to noise.

Lipman et al. 2022 (arXiv 2210.02747); times as in "The Coupling Within" (arXiv 2603.09014).
t = 0 is the image, t = 1 is the noise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nfm.trainers.training.randomness import Randomness

Times = Callable[[Randomness], Tensor]  # float32 [B] in [0, 1], one a record
MEAN, DEVIATION = -0.2, 1.0


def logit_normal(random: Randomness, mean: float = MEAN, deviation: float = DEVIATION) -> Tensor:
    """Times [B] in (0, 1): sigmoid(n), n ~ Normal(mean, deviation^2)."""
    return torch.sigmoid(random.normal() * deviation + mean)


def uniform(random: Randomness) -> Tensor:
    """Times [B], uniform in [0, 1)."""
    return random.uniform()


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
    times: Times = logit_normal,
) -> Tensor:
    """|| g(x_t, t, c) - (noise - image) ||^2, a scalar: the mean over pairs and dimensions.

    image, noise: float32 [B, ...]; label: int64 [B], each dropped (-1) with probability `label_drop`.
    """
    t = times(random).to(image)
    dropped = random.uniform() < label_drop
    label = label.masked_fill(dropped.to(label.device), -1)
    velocity = model(interpolate(image, noise, t), t, label)
    return (velocity - (noise - image)).square().mean()


def velocity(
    model: Any, labels: Tensor, guidance: float = 0.0, interval: tuple[float, float] = (0.0, 1.0)
) -> Callable[[Tensor, Any], Tensor]:
    """A student as the solvers want it: velocity(x, t) for these labels, in float32.

    With guidance g it is v + g (v - v without labels), the two taken in one pass (Ho & Salimans 2022,
    arXiv 2207.12598, whose guided model is the same combination), at times of the interval alone (Kynkaanniemi et al.
    2024, arXiv 2404.07724).
    """

    def call(x: Tensor, t: Any) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        if not guidance or not interval[0] <= float(t) <= interval[1]:
            return model(x, times, labels).float()
        both = torch.cat([labels, torch.full_like(labels, -1)])
        with_labels, without = model(torch.cat([x, x]), torch.cat([times, times]), both).float().chunk(2)
        return with_labels + guidance * (with_labels - without)

    return call
