"""Couplings: which noise is paired with which image. One interface for every source of pairs."""

import math
from typing import Protocol

import torch
from torch import Tensor

from nfm.trainers.tarflow import TarFlow, nll_per_dim


class Coupling(Protocol):
    """Images and fresh standard normal noise give the noise of each pair.

    Images come flipped already, since the noise of a flipped image is not the flipped noise.
    """

    name: str

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, C, H, W] in [-1, 1], labels int64 [B], eps [B, C, H, W] -> (noise, nll).

        noise: float32 [B, C, H, W] of unit variance; nll: float32 [B], the teacher's nats per dimension
        without the constant, nan where there is no teacher. Both on the coupling's own device.
        """
        ...


class Independent:
    """The noise knows nothing of the image: z = eps."""

    name = "independent"

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return eps, torch.full((len(eps),), math.nan)


class NFM:
    """The teacher's own noise of each image: z = f(x + eta eps, c) / sigma_f (arXiv 2603.09014)."""

    name = "nfm"

    def __init__(
        self,
        model: TarFlow,
        eta: float,
        sigma_f: float,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        """`model` is on `device` already; sigma_f is sqrt(E[f^2]), measured with the teacher."""
        if not (math.isfinite(sigma_f) and sigma_f > 0):
            raise ValueError(f"sigma_f = {sigma_f} is no scale of noise; train or measure this teacher again")
        self.model = model.eval()
        self.eta = eta
        self.sigma_f = sigma_f
        self.device = torch.device(device)
        self.autocast = autocast

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        x = (images + self.eta * eps).to(self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            z, logdet = self.model.encode(x, labels.to(self.device))
        return (z / self.sigma_f).float(), nll_per_dim(z, logdet).float()
