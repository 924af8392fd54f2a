"""Moving averages of a model's weights: what teachers encode and students sample with."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nfm.trainers.training import parallel
from nfm.trainers.training.profiles import gamma_of


class _Follower:
    """A copy of a model that follows it: `model` is ready to evaluate."""

    def __init__(self, model: nn.Module) -> None:
        self.model = shadow_of(model)
        self._of: nn.Module | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []  # each parameter of the copy with that of the model

    @torch.no_grad()
    def follow(self, model: nn.Module, weight: float) -> None:
        """copy <- (1 - weight) copy + weight model, of what is floating point; the rest is copied.

        Parameters are looked up at the first step, which takes as long as averaging them. A model may put other buffers
        in the place of its own, so these are looked up each time.
        """
        if self._of is not model:
            self._of, self._pairs = model, _beside(self.model.named_parameters(), model.named_parameters())
        averages, targets = [], []
        for average, target in (*self._pairs, *_beside(self.model.named_buffers(), model.named_buffers())):
            if average.is_floating_point():
                averages.append(parallel.local(average))
                targets.append(parallel.local(target).to(average.dtype))
            else:
                average.copy_(target)
        torch._foreach_lerp_(averages, targets, weight)


def _beside(
    averages: Iterable[tuple[str, Tensor]], targets: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    named = dict(targets)
    return [(average, named[name]) for name, average in averages]


class EMA(_Follower):
    """A float32 copy of `model` that follows it: `ema.model` is ready to evaluate, `update` after each step.

    The n-th update (n = 1, 2, ...) is shadow <- d_n shadow + (1 - d_n) weights with the warmed-up decay
    d_n = min(decay, n / (n + 9)): 0.1 at first, so that the initial weights are forgotten within a few steps,
    and `decay` from n = 9 decay / (1 - decay) on. Floating point buffers (batch-norm statistics) are averaged
    like weights, integer ones copied. A float64 model keeps a float64 shadow.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay is {decay}; it must lie in [0, 1), for example 0.999")
        super().__init__(model)
        self.decay = decay
        self.updates = 0

    def current_decay(self) -> float:
        """The decay of the latest update."""
        return min(self.decay, self.updates / (self.updates + 9))

    def update(self, model: nn.Module) -> None:
        """Moves the average towards `model`, which has the same architecture and device."""
        self.updates += 1
        self.follow(model, 1.0 - self.current_decay())


class PowerEMA(_Follower):
    """A copy of `model` that follows it with the relative width `width`, the deviation of its profile over t."""

    def __init__(self, model: nn.Module, width: float) -> None:
        super().__init__(model)
        self.width = width
        self._gamma = gamma_of(width)

    def update(self, model: nn.Module, examples_seen: int, batch_size: int) -> None:
        """After a step of `batch_size` examples: shadow <- beta shadow + (1 - beta) weights (equation 127).

        beta = (1 - batch_size / examples_seen)^(gamma + 1), so the first step's weights replace the initial ones.
        """
        beta = (1 - batch_size / examples_seen) ** (self._gamma + 1)
        self.follow(model, 1 - beta)


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, without gradients, at least in float32."""
    shadow = copy.deepcopy(model).eval().requires_grad_(False)
    tensors = (*shadow.parameters(), *shadow.buffers())
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        shadow.float()
    return shadow
