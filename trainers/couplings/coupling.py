"""Couplings: which noise is paired with which image. One interface for every source of pairs."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nfm.trainers.models.tarflow import TarFlow, nll_per_dim
from nfm.trainers.training.products import products

Scope = Literal["record", "shard"]


class Pairs(NamedTuple):
    """What a coupling decides about n records. A field that is None is as in the source.

    `nll` is the teacher's nats per dimension without the constant. Records of the same `group` had their noises dealt
    among them; a group is named by the position of its first record in the call.
    """

    noise: Tensor  # float32 [n, C, H, W] of unit variance
    nll: Tensor | None = None  # float32 [n]
    group: Tensor | None = None  # int64 [n]
    row: Tensor | None = None  # int64 [n]: the source row whose image replaces the slot's own
    image: Tensor | None = None  # float32 [n, C, H, W] in the data's range: a generated image


class Coupling(Protocol):
    """Images, labels and new standard normal noise give the pairs.

    With scope "record" a pair depends only on its record, not on the rest of the batch. With scope "shard" it depends
    on all records of its shard, which come in one call, in the order of their slots.
    """

    name: str
    scope: Scope

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> Pairs:
        """images [B, C, H, W] in [-1, 1], labels int64 [B] (-1: none), eps [B, C, H, W] -> pairs.

        Images are already flipped, because the noise of a flipped image is not the flipped noise. Tensors are returned
        on the coupling's own device.
        """
        ...


class Independent:
    """The noise is independent of the image: z = eps."""

    name = "independent"
    scope: Scope = "record"

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> Pairs:
        return Pairs(eps)


class NFM:
    """The teacher's noise of each image: z = f(x + eta eps, c) / sigma_f (arXiv 2603.09014)."""

    name = "nfm"
    scope: Scope = "record"

    def __init__(
        self,
        model: TarFlow,
        eta: float,
        sigma_f: float,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        tf32: bool = False,
    ) -> None:
        """`model` is already on `device`; sigma_f is sqrt(E[f^2]), measured with the teacher."""
        if not (math.isfinite(sigma_f) and sigma_f > 0):
            raise ValueError(f"sigma_f = {sigma_f} is no scale of noise; train or measure this teacher again")
        self.model = model.eval()
        self.eta = eta
        self.sigma_f = sigma_f
        self.device = torch.device(device)
        self.autocast, self.tf32 = autocast, tf32

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> Pairs:
        x = (images + self.eta * eps).to(self.device)
        autocast = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with products(self.tf32), autocast:
            z, logdet = self.model.encode(x, labels.to(self.device))
        return Pairs((z / self.sigma_f).float(), nll_per_dim(z, logdet).float())


class Generated:
    """Reflow (Liu et al. 2022, arXiv 2209.03003): a trained student generates the image from the noise."""

    name = "reflow"
    scope: Scope = "record"

    def __init__(self, sample: Callable[[Tensor, Tensor], Tensor], device: str = "cpu") -> None:
        """`sample` maps noise [B, C, H, W] and labels [B], both on `device`, to images in the data's range."""
        self.sample = sample
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> Pairs:
        return Pairs(eps, image=self.sample(eps.to(self.device), labels.to(self.device)).float())


class Custom:
    """The noise from a user's function: `function(images, labels, rng)`, with numpy arrays and one call for
    each shard.
    """

    name = "custom"
    scope: Scope = "shard"

    def __init__(
        self,
        function: Callable[..., Any],
        called: str,
        rngs: Callable[[int, int], np.random.Generator],
        place: tuple[int, int] = (0, 0),
    ) -> None:
        """`called` is the function's name in messages.

        `rngs` gives the generator of (draw, shard); `place` is (draw, shard).
        """
        self.function = function
        self.called = called
        self.rngs = rngs
        self.place = place

    def at(self, draw: int, shard: int) -> "Custom":
        """The same coupling for another shard."""
        return Custom(self.function, self.called, self.rngs, (draw, shard))

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> Pairs:
        """Raises ValueError if the result is not noise: another shape or dtype, or values that are not finite."""
        # Copies, because the function may change its arguments.
        found = self.function(images.numpy().copy(), labels.numpy().copy(), self.rngs(*self.place))
        if not isinstance(found, np.ndarray):
            raise ValueError(f"{self.called} returned a {type(found).__name__}; return a numpy array, the noise")
        if found.shape != tuple(images.shape):
            raise ValueError(
                f"{self.called} returned noise of {_by(found.shape)} for images of {_by(images.shape)}; "
                "return the noise of each image, in their shape"
            )
        if found.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{self.called} returned noise of dtype {found.dtype}; return float32, float16 or float64")
        if bad := int((~np.isfinite(found)).sum()):
            raise ValueError(f"{self.called} returned {bad} values that are not finite; noise is about N(0, 1)")
        return Pairs(torch.from_numpy(np.array(found, np.float32)))


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
