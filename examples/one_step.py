"""A student that needs one step: it regresses the image on its noise. Only pairs that belong together allow this.

    [student]
    objective = "one_step:objective"
    sampler = "one_step:sampler"

With a coupling such as `nfm` each noise has its image, and the best guess of it is nearly that image. With independent
pairs the best guess is the mean of all images of the class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def objective(network: nn.Module, batch: Any, random: Any) -> Tensor:
    """|| noise - g(noise, 1, c) - image ||^2, the mean over pairs and dimensions; a label in ten is dropped."""
    label = torch.where(random.uniform() < 0.1, -1, batch.label)
    return (sampler(network, batch.noise, label) - batch.image).square().mean()


def sampler(network: nn.Module, noise: Tensor, label: Tensor) -> Tensor:
    """The images of these noises, by one evaluation at t = 1, where flow matching's first step would be."""
    return noise - network(noise, torch.ones(len(noise), device=noise.device), label)
