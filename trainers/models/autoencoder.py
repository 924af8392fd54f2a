"""The VAE of latent diffusion: diffusers' AutoencoderKL, read from a local folder (Rombach et al. 2022, arXiv
2112.10752).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

INSTALL = "pip install 'nfm-pairs[latents]'"


def load(folder: Path) -> nn.Module:
    """The VAE in evaluation mode, from config.json and one file of safetensors: no download, no pickle.

    Raises ImportError if diffusers cannot be imported, ValueError if the files are not such a VAE.
    """
    kind = _class()
    try:
        model = kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # whatever diffusers makes of a broken file
        raise ValueError(f"{folder}: cannot be read as an AutoencoderKL: {type(error).__name__}: {error}") from error
    return cast("nn.Module", model.eval().requires_grad_(False))


def _class() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {INSTALL}") from error
    except (ImportError, RuntimeError) as error:
        # diffusers imports torchvision where it is installed, which fails if it was built for another torch.
        raise ImportError(
            f"diffusers cannot be imported ({str(error).splitlines()[-1]}): install the torchvision that was built for "
            f"torch {torch.__version__}, from the same index as torch, or none"
        ) from error
    return AutoencoderKL


def encode(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, c, h, w] of the posterior of images [B, C, H, W] in [-1, 1]."""
    posterior = model.encode(images).latent_dist
    return posterior.mean, posterior.std


class Encoder(nn.Module):
    """The encoder alone, with random weights: the mean of the posterior. Raises ImportError as `load`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.vae = _class().from_config(config)

    def forward(self, images: Tensor) -> Tensor:
        return encode(self.vae, images)[0]


def decode(model: Any, latents: Tensor) -> Tensor:
    """Images [B, C, H, W] in about [-1, 1] of latents [B, c, h, w]."""
    return model.decode(latents).sample
