"""Flow matching on given pairs: x_t = (1 - t) x + t z, regress the velocity z - x. t = 0 is data, t = 1 is noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sample_times(count: int, generator: torch.Generator, mean: float = -0.2, std: float = 1.0) -> Tensor:
    """Logit-normal times [count] in (0, 1): sigmoid(n), n ~ Normal(-0.2, 1)."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=generator.device))


def interpolate(image: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point of each straight path at time t [B]."""
    t = t.view(-1, *[1] * (image.dim() - 1))
    return (1 - t) * image + t * noise


def loss(
    model: nn.Module, image: Tensor, noise: Tensor, label: Tensor, generator: torch.Generator, label_drop: float = 0.1
) -> Tensor:
    """Mean of |g(x_t, t, c) - (z - x)|^2 over the batch and dimensions; a label is dropped (-1) with `label_drop`."""
    t = sample_times(len(image), generator)
    dropped = torch.rand(len(image), generator=generator, device=generator.device) < label_drop
    velocity = model(interpolate(image, noise, t), t, label.masked_fill(dropped, -1))
    return (velocity.float() - (noise - image)).square().mean()
