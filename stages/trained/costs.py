"""The cost of a stage before it runs: FLOPs from the sizes, and time from this machine's rate of matrix products."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nfm.stages.display.units import about

if TYPE_CHECKING:
    from torch import nn

EFFICIENCY = 0.25  # of the measured rate; small models with attention and norms reached 0.2 to 0.35 on CPUs


def tokens_of(image_shape: Sequence[int], patch: int) -> tuple[int, int]:
    """(tokens, features of a token) for images [C, H, W] in patches."""
    channels, height, width = image_shape
    return (height // patch) * (width // patch), channels * patch**2


def teacher_flops(image_shape: Sequence[int], config: Any) -> float:
    """FLOPs to encode one image: 12 width^2 weights in each layer, attention, embedding and head.

    Computed by formula: torch counts twice the work of causal attention, but fused kernels skip what is masked.
    """
    (tokens, features), width = tokens_of(image_shape, config.patch), config.channels
    weights = 12 * config.layers * width**2 + 3 * features * width
    return config.blocks * (2.0 * tokens * weights + 2.0 * config.layers * tokens**2 * width)


def velocity_flops(build: Callable[[], nn.Module], image_shape: Sequence[int]) -> float:
    """FLOPs of the velocity of one image by any network g(x, t), counted by torch from shapes alone."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build()(torch.empty(1, *image_shape), torch.empty(1))
    return float(counter.get_total_flops())


def describe(flops: float) -> dict[str, str]:
    """FLOPs and their time on this machine, as a plan shows them."""
    return {"FLOPs": f"{flops:.2g}", "here": f"about {about(flops / (matrix_rate() * EFFICIENCY))}"}


@functools.cache
def matrix_rate() -> float:
    """FLOP/s of a bf16 matrix product of moderate size on the device that training would use (best of five)."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
