"""The network that the examples train, a stand-in for yours: any module that maps (x, t, label) to a velocity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Velocity(nn.Module):
    """Affine in x and t, with an offset for each class; label -1 is "no class"."""

    def __init__(self, shape: tuple[int, ...], classes: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(shape) + 1, math.prod(shape))
        self.offset = nn.Embedding((classes or 0) + 1, math.prod(shape))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The velocity at x [B, *shape], t [B], label int64 [B]: float32 [B, *shape]."""
        flat = self.linear(torch.cat([x.flatten(1), t.view(-1, 1)], dim=1))
        return (flat + self.offset(label + 1)).view_as(x)
