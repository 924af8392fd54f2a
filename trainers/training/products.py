"""How products of float32 matrices, and convolutions, are computed on a CUDA device: in float32, or in TF32.

TF32 rounds the factors to 10 bits of mantissa and adds up in float32. Torch convolves in it unless told otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_tf32 = False


def in_tf32() -> bool:
    """Whether products are in TF32 now."""
    return _tf32


def forbid_tf32() -> None:
    """Products are in float32 from here on, but within `products(tf32=True)`."""
    _set(_tf32)


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Within it, products of this process are in TF32, or in float32; afterwards as before."""
    before = _tf32
    _set(tf32)
    try:
        yield
    finally:
        _set(before)


def matrix_rate(
    device: str, dtype: torch.dtype | None = None, tf32: bool = False, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of products of square matrices of this type, without casts, of a size that suits the device.

    The best of many in a few tenths of a second, for others may be at work on the machine; sizes double until a product
    takes a hundredth of a second.
    """
    size, rate, began = 256, 0.0, clock()
    while True:
        a, taken = torch.randn(size, size, device=device, dtype=dtype), list[float]()
        with torch.no_grad(), products(tf32):
            while len(taken) < 3 or (min(taken) > 0.01 and clock() < began + 0.3):
                started = clock()
                (a @ a)[0, 0].item()
                taken.append(clock() - started)
        rate = max(rate, 2 * size**3 / min(taken))
        if min(taken) > 0.01 or size == 8192:
            return rate
        size *= 2


def _set(tf32: bool) -> None:
    global _tf32
    _tf32 = tf32
    # By `fp32_precision` alone other parts of torch 2.13, its compiler among them, raise where they ask in older ways.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
