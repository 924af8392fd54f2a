"""What stages cost before they run: arithmetic from the sizes, time from this machine's rate of matrix products."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

EFFICIENCY = 0.25  # of the probe's rate; small models with attention and norms reached 0.2 to 0.35 on CPUs


def transformer_flops(tokens: int, width: int, layers: int, features: int, causal: bool = False) -> float:
    """FLOPs of one forward pass of one example: 12 width^2 weights a layer, attention, embedding and head.

    Causal attention counts half: fused kernels skip what is masked.
    """
    weights = 12 * layers * width**2 + 3 * features * width
    return 2.0 * tokens * weights + (2.0 if causal else 4.0) * layers * tokens**2 * width


def tokens_of(image_shape: Sequence[int], patch: int) -> tuple[int, int]:
    """(tokens, features of a token) of images [C, H, W] in patches."""
    channels, height, width = image_shape
    return (height // patch) * (width // patch), channels * patch**2


def teacher_flops(image_shape: Sequence[int], config: Any) -> float:
    """FLOPs to encode one image."""
    tokens, features = tokens_of(image_shape, config.patch)
    return config.blocks * transformer_flops(tokens, config.channels, config.layers, features, causal=True)


def student_flops(image_shape: Sequence[int], config: Any) -> float:
    """FLOPs of one evaluation of the velocity of one image."""
    if config.arch == "unet":
        import torch

        from nfm.trainers.models.unet import UNet

        with torch.device("meta"):  # sizes without memory
            return UNet(image_shape, 0, config.width, config.depth).flops()
    tokens, features = tokens_of(image_shape, config.patch)
    return transformer_flops(tokens, config.width, config.depth, features)


def describe(flops: float) -> dict[str, str]:
    """FLOPs and the time that they take here, as a plan shows them."""
    return {"FLOPs": f"{flops:.2g}", "here": f"about {duration(flops / (matrix_rate() * EFFICIENCY))}"}


def duration(seconds: float) -> str:
    """A time in the unit that suits, years at most."""
    for size, unit in ((365 * 86400, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds > 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


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
