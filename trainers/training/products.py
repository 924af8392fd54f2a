"""How products of float32 matrices, and convolutions, are computed on a CUDA device: in float32, or in TF32.

TF32 rounds the factors to 10 bits of mantissa and adds up in float32. Torch convolves in it unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def _set(tf32: bool) -> None:
    global _tf32
    _tf32 = tf32
    # By `fp32_precision` alone other parts of torch 2.13, its compiler among them, raise where they ask in older ways.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
