"""The precision of a stage's matrix products: float32, TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal

from nfm.stages.base import Unfit

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "tf32", "bfloat16"]


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type of the matrix products; affine steps and log-determinants stay in float32 whatever it is."""
    import torch

    return torch.bfloat16 if precision == "bfloat16" else None


def check_precision(device: str, precision: Precision, field: str = "precision") -> None:
    """Raises Unfit where a device does not compute in this precision."""
    import torch

    if precision != "tf32":
        return
    if not device.startswith("cuda"):
        raise Unfit(f'{field} = "tf32" is of CUDA devices, and the device is {device}: use "float32"')
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise Unfit(f'{field} = "tf32": {torch.cuda.get_device_name(device)} has no TF32; use "float32"')


def matrix_products(precision: Precision) -> AbstractContextManager[None]:
    """Products of float32 in TF32 where the precision says so; else in float32, also where torch would not."""
    from nfm.trainers.training.products import products

    return products(tf32=precision == "tf32")


@contextmanager
def precision_context(device_type: str, precision: Precision) -> Iterator[None]:
    """Autocast and matrix products as a stage's precision asks for."""
    import torch

    dtype = autocast_dtype(precision)
    with matrix_products(precision), torch.autocast(device_type, dtype, enabled=dtype is not None):
        yield
