"""Inception features, for the distance called FID, and published statistics of them.

They need a local weights file and suit natural images. torch-fidelity's network with the published weights, which are
those of TensorFlow's graph of 2015-12-05, gives the features that FID is defined by; so published statistics compare.
"""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfm.stages.base import Unfit
from nfm.storage import ImageDataset
from nfm.storage.errors import by
from nfm.storage.files import atomic

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"  # begins the SHA-256 of that file, as its name says
VALUES = 2048


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
    return atomic.standing_sha256(find_weights(path))


def statistics_sha256(path: str) -> str:
    """SHA-256 of a file of statistics, in the same way. Raises as `statistics`."""
    return atomic.standing_sha256(_find_statistics(path))


def statistics(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean [2048] and covariance [2048, 2048] of Inception features in an .npz file, as `mu` and `sigma`.

    Raises Unfit for anything else: ADM's reference batches and EDM's statistics have these two; EDM2's are pickles.
    """
    return _statistics(*_now(_find_statistics(path)))


def _find_statistics(path: str) -> Path:
    if not Path(path).is_file():
        raise Unfit(f"evaluate.statistics = {path!r}: there is no such file; give an .npz file with mu and sigma")
    return Path(path)


@functools.lru_cache(maxsize=1)
def _statistics(file: Path, size: int, modified_ns: int) -> tuple[np.ndarray, np.ndarray]:
    told = f"evaluate.statistics = {str(file)!r}"
    if not zipfile.is_zipfile(file):
        raise Unfit(
            f"{told}: no .npz file; a pickle, as of EDM2, could run code and is not read: open it where you trust it, "
            "and save its mean and covariance with numpy.savez(FILE, mu=..., sigma=...)"
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if missing := [name for name in ("mu", "sigma") if name not in arrays]:
                there = ", ".join(sorted(arrays.files)[:8])
                raise Unfit(f"{told}: it has no {' and no '.join(missing)}, but {there}; give statistics of features")
            mean, covariance = arrays["mu"], arrays["sigma"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise Unfit(f"{told}: mu and sigma cannot be read ({error}); give the file again from where it came") from error
    for name, array, shape in (("mu", mean, (VALUES,)), ("sigma", covariance, (VALUES, VALUES))):
        if array.shape != shape or array.dtype.kind != "f":
            raise Unfit(
                f"{told}: {name} is {by(array.shape) or 'one value'} of {array.dtype}, and statistics of Inception's "
                f"features have {by(shape)} floats; give statistics of its last pooling layer"
            )
        if not np.isfinite(array).all():
            raise Unfit(f"{told}: {name} has values that are not finite; give the file again from where it came")
    if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-6 * np.abs(covariance).max()):
        raise Unfit(f"{told}: sigma is not symmetric, so it is no covariance; give the file again from where it came")
    if covariance.diagonal().min() < 0:
        raise Unfit(f"{told}: sigma has a negative variance, so it is no covariance; give another file")
    return mean.astype(np.float64), covariance.astype(np.float64)


def _now(file: Path) -> tuple[Path, int, int]:
    found = file.stat()
    return file.resolve(), found.st_size, found.st_mtime_ns


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
