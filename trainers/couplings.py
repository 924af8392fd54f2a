"""Couplings: which noise is paired with which image. One interface for every source of pairs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nfm.trainers.tarflow import TarFlow, nll_per_dim


class Coupling(Protocol):
    """Images [B, C, H, W] in [-1, 1], labels [B] and standard normal eps' give noise and, where known, its nll."""

    name: str

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """(noise [B, C, H, W] float32, nll [B] in nats per dimension, nan where the coupling has none)."""
        ...


class Independent:
    """The noise knows nothing of the image: z = eps'."""

    name = "independent"

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return eps, torch.full((len(eps),), torch.nan)


class NFM:
    """The teacher's own noise of each image: z = f(x + eta eps', c) / sigma_f (arXiv 2603.09014)."""

    name = "nfm"

    def __init__(
        self, model: TarFlow, eta: float, sigma_f: float, device: str = "cpu", autocast: torch.dtype | None = None
    ) -> None:
        self.model = model.eval()
        self.eta, self.sigma_f, self.device, self.autocast = eta, sigma_f, torch.device(device), autocast

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        noised = (images + self.eta * eps).to(self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            z, logdet = self.model.encode(noised, labels.to(self.device))
        return z.float() / self.sigma_f, nll_per_dim(z, logdet).float()
