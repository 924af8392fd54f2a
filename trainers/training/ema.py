"""Exponential moving average of a model's weights: what teachers encode and students sample with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nfm.trainers.training import parallel


class EMA:
    """A float32 copy of `model` that follows it: `ema.model` is ready to evaluate, `update` after each step.

    The n-th update (n = 1, 2, ...) is shadow <- d_n shadow + (1 - d_n) weights with the warmed-up decay
    d_n = min(decay, n / (n + 9)): 0.1 at first, so that the initial weights are forgotten within a few steps,
    and `decay` from n = 9 decay / (1 - decay) on. Floating point buffers (batch-norm statistics) are averaged
    like weights, integer ones copied. A float64 model keeps a float64 shadow.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay is {decay}; it must lie in [0, 1), for example 0.999")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in _state(self.model).values()):
            self.model.float()

    def current_decay(self) -> float:
        """The decay of the latest update."""
        return min(self.decay, self.updates / (self.updates + 9))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards `model`, which has the same architecture and device."""
        self.updates += 1
        weight = 1.0 - self.current_decay()
        weights = _state(model)
        shadows, targets = [], []
        for name, shadow in _state(self.model).items():
            if shadow.is_floating_point():
                shadows.append(parallel.local(shadow))
                targets.append(parallel.local(weights[name]).to(shadow.dtype))
            else:
                shadow.copy_(weights[name])
        torch._foreach_lerp_(shadows, targets, weight)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, including buffers that no state_dict keeps, without copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
