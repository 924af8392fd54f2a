"""Moving averages of a model's weights: what teachers encode and students sample with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nfm.trainers.training import parallel
from nfm.trainers.training.profiles import gamma_of


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
        self.model = shadow_of(model)

    def current_decay(self) -> float:
        """The decay of the latest update."""
        return min(self.decay, self.updates / (self.updates + 9))

    def update(self, model: nn.Module) -> None:
        """Moves the average towards `model`, which has the same architecture and device."""
        self.updates += 1
        follow(self.model, model, 1.0 - self.current_decay())


class PowerEMA:
    """A copy of `model` that follows it with the relative width `width`, the deviation of its profile over t."""

    def __init__(self, model: nn.Module, width: float) -> None:
        self.width = width
        self._gamma = gamma_of(width)
        self.model = shadow_of(model)

    def update(self, model: nn.Module, examples_seen: int, batch_size: int) -> None:
        """After a step of `batch_size` examples: shadow <- beta shadow + (1 - beta) weights (equation 127).

        beta = (1 - batch_size / examples_seen)^(gamma + 1), so the first step's weights replace the initial ones.
        """
        beta = (1 - batch_size / examples_seen) ** (self._gamma + 1)
        follow(self.model, model, 1 - beta)


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, without gradients, at least in float32."""
    shadow = copy.deepcopy(model).eval().requires_grad_(False)
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in _state(shadow).values()):
        shadow.float()
    return shadow


@torch.no_grad()
def follow(shadow: nn.Module, model: nn.Module, weight: float) -> None:
    """shadow <- (1 - weight) shadow + weight model, of what is floating point; the rest is copied."""
    weights = _state(model)
    shadows, targets = [], []
    for name, average in _state(shadow).items():
        if average.is_floating_point():
            shadows.append(parallel.local(average))
            targets.append(parallel.local(weights[name]).to(average.dtype))
        else:
            average.copy_(weights[name])
    torch._foreach_lerp_(shadows, targets, weight)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, including buffers that no state_dict keeps, without copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
