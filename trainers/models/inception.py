"""Inception-v3 for FID: torch-fidelity's port of the original weights, read from a local file."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES = "2048"
INSTALL = "pip install torch-fidelity==0.4.0"


def load(weights: Path) -> nn.Module:
    """The network in evaluation mode. `weights` have the layout of pt_inception-2015-12-05-6726825d.pth.

    Raises ImportError if torch-fidelity cannot be imported, ValueError if the file does not have such weights, and
    FileNotFoundError. Nothing is ever downloaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: `{INSTALL}`") from error
    except (ImportError, RuntimeError) as error:
        # torch-fidelity imports torchvision, which fails with a RuntimeError if it was built for another torch.
        raise ImportError(
            f"torch-fidelity cannot be imported ({error}): install the torchvision that was built for torch "
            f"{torch.__version__}, from the same index as torch"
        ) from error
    try:
        # The constructor below reads the file with pickle allowed, so its contents are checked first.
        torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights} is no file of weights: {_first_line(error)}") from error
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", [FEATURES], feature_extractor_weights_path=str(weights)
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{weights} does not hold the Inception-v3 of FID: {_first_line(error)} "
            "Give pt_inception-2015-12-05-6726825d.pth, as torch-fidelity and torchmetrics use it"
        ) from error


def features(network: nn.Module, images: Tensor) -> Tensor:
    """Features [B, 2048] float32 of uint8 images [B, 1 or 3, H, W]. The network resizes them to 299 x 299."""
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return network(images)[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["it is empty or cut short"])[0]
