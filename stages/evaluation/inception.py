"""Inception features, for the distance called FID. They need a local weights file and suit natural images."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfm.stages.base import Unfit
from nfm.storage import ImageDataset

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"


def find_weights(path: str | None) -> Path:
    """The weights file in the config. Raises StageError if none is named or if it does not exist."""
    if path is None:
        raise Unfit(
            f'evaluate.features = "inception" needs evaluate.inception_weights: the path of {WEIGHTS}, '
            "which torch-fidelity and torchmetrics take from the releases of toshas/torch-fidelity"
        )
    if not Path(path).is_file():
        raise Unfit(f"evaluate.inception_weights = {path!r}: there is no such file; give the path of {WEIGHTS}")
    return Path(path)


def weights_sha256(path: str | None) -> str:
    """SHA-256 of the weights file, read once in each process unless the file changes. Raises as `find_weights`."""
    file = find_weights(path)
    found = file.stat()
    return _sha256(file.resolve(), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _sha256(file: Path, size: int, modified_ns: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load(weights: str | None, source: ImageDataset, device: str) -> nn.Module:
    """The network for the images of `source`. Raises StageError with the remedy if it cannot be loaded."""
    file = find_weights(weights)
    channels = source.image_shape[0]
    if source.dtype != "uint8" or channels not in (1, 3):
        raise Unfit(
            f'evaluate.features = "inception" takes uint8 images of 1 or 3 channels, the data has {source.dtype} '
            f'images of {channels}; use evaluate.features = "cnn"'
        )
    from nfm.trainers.models import inception

    try:
        return inception.load(file).to(device)
    except ImportError as error:
        raise Unfit(f'evaluate.features = "inception": {error}') from error
    except ValueError as error:
        raise Unfit(f"evaluate.inception_weights: {error}") from error


def extract(network: nn.Module, images: np.ndarray, batch_size: int = 50) -> np.ndarray:
    """Features [N, 2048] float32 of uint8 images [N, C, H, W]."""
    import torch

    from nfm.trainers.models import inception

    device = next(network.parameters()).device
    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).to(device)
            parts.append(inception.features(network, batch).cpu())
    return torch.cat(parts).numpy()
