"""Checks of accuracy: z against float64, z decoded against its image, and the same pairs made twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfm.stages.base import StageError
from nfm.stages.encoding.coupling import as_teacher
from nfm.stages.encoding.slots import Sources
from nfm.stages.trained.devices.machine import is_out_of_memory
from nfm.storage import ImageDataset

if TYPE_CHECKING:
    from torch import Tensor

    from nfm.trainers.couplings.coupling import Coupling
    from nfm.trainers.models.tarflow import TarFlow

REFERENCE_IMAGES = 4


def against_reference(coupling: Coupling, source: ImageDataset, slots: Sources, noise: np.ndarray) -> float | None:
    """RMS of z of the first images minus z computed in float64; None if float64 does not fit into memory."""
    import torch

    teacher = as_teacher(coupling)
    if teacher is None:
        return None
    first = slice(0, REFERENCE_IMAGES)
    arrays = (source.to_float(slots.image[first]), slots.label[first], slots.eps[first], noise[first])
    try:
        return noise_error(teacher.model, teacher.eta, teacher.sigma_f, *map(torch.from_numpy, arrays))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def noise_error(
    model: TarFlow, eta: float, sigma_f: float, images: Tensor, labels: Tensor, eps: Tensor, noise: Tensor
) -> float:
    """RMS of `noise` (z as it was encoded) minus z computed by a float64 copy of the model, on the model's device.

    All arguments are of a few images: images, eps and noise [n, C, H, W], labels int64 [n].
    """
    import torch

    device = next(model.parameters()).device
    reference = copy.deepcopy(model).double()
    x = images.to(device).double() + eta * eps.to(device).double()
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        z, _ = reference.encode(x, labels.to(device))
        return float((noise.to(device).double() - z / sigma_f).square().mean().sqrt())


def check_repeatable(noise: np.ndarray, again: np.ndarray) -> None:
    """Raises StageError unless a user's function gave the same noise in two calls with the same arguments."""
    if differ := int((noise != again).sum()):
        raise StageError(
            "pairs.custom: called twice with the same images, labels and random numbers, the function gave other "
            f"noise: {differ:,} of {noise.size:,} values differ, so nobody could make its pairs again. Take all random "
            "numbers from the generator that it is given, and keep nothing from one call to the next"
        )


def decode_error(
    coupling: Coupling, source: ImageDataset, slots: Sources, noise: np.ndarray, store: Path
) -> np.ndarray:
    """RMS of each record of decode(sigma_f z) minus x + eta eps', in float32. `noise` is z [n, C, H, W]."""
    import torch

    teacher = as_teacher(coupling)
    if teacher is None:
        raise StageError(f"{store}: coupling {coupling.name!r} has no teacher to decode with")
    noised = torch.from_numpy(source.to_float(slots.image) + teacher.eta * slots.eps).to(teacher.device)
    labels = torch.from_numpy(slots.label).to(teacher.device)
    with torch.inference_mode():
        back = teacher.model.decode(torch.from_numpy(noise).to(teacher.device) * teacher.sigma_f, labels)
    return (back - noised).flatten(1).square().mean(1).sqrt().cpu().numpy()
