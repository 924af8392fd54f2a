"""How far pairs are from what they should be: z against float64, decoded against its image, and made twice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfm.stages.base import StageError
from nfm.stages.encoding.coupling import as_teacher
from nfm.stages.encoding.memory import is_out_of_memory
from nfm.stages.encoding.slots import Sources
from nfm.storage import ImageDataset

if TYPE_CHECKING:
    from nfm.trainers.couplings.coupling import Coupling

REFERENCE_IMAGES = 4


def against_reference(coupling: Coupling, source: ImageDataset, slots: Sources, noise: np.ndarray) -> float | None:
    """RMS of z of the first images minus the same computed in float64; None where that does not fit into memory."""
    import torch

    from nfm.stages.encoding.probe import noise_error

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


def check_repeatable(noise: np.ndarray, again: np.ndarray) -> None:
    """Raises StageError unless a function of one's own, called twice with the same arguments, gave the same noise."""
    if differ := int((noise != again).sum()):
        raise StageError(
            "pairs.custom: called twice with the same images, labels and random numbers, the function gave other "
            f"noise: {differ:,} of {noise.size:,} values differ, so nobody could make its pairs again. Take all random "
            "numbers from the generator that it is given, and keep nothing from one call to the next"
        )


def decode_error(
    coupling: Coupling, source: ImageDataset, slots: Sources, noise: np.ndarray, store: Path
) -> np.ndarray:
    """RMS over each record of decode(sigma_f z) minus x + eta eps', in float32; `noise` is z [n, C, H, W]."""
    import torch

    teacher = as_teacher(coupling)
    if teacher is None:
        raise StageError(f"{store}: coupling {coupling.name!r} has no teacher to decode with")
    noised = torch.from_numpy(source.to_float(slots.image) + teacher.eta * slots.eps).to(teacher.device)
    labels = torch.from_numpy(slots.label).to(teacher.device)
    with torch.inference_mode():
        back = teacher.model.decode(torch.from_numpy(noise).to(teacher.device) * teacher.sigma_f, labels)
    return (back - noised).flatten(1).square().mean(1).sqrt().cpu().numpy()
