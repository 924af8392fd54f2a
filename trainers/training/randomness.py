"""The random numbers of one training step: the same for any number of processes and microbatches."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def step_seed(seed: int, examples_seen: int, purpose: str) -> int:
    """A seed of 63 bits, a function of its arguments alone."""
    name = f"{purpose},{seed},{examples_seen}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1  # torch takes 63 bits


def seed_own(seed: int, device: torch.device) -> None:
    """Seeds torch's own generators of the host and of `device`, which layers such as dropout draw from.

    torch.manual_seed also goes through every kind of device that torch knows and this machine may not have: 130 us a
    step, in place of 3.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


class Randomness:
    """Random numbers for some records of a batch; a loss draws all its randomness here, in a fixed order.

    Each call draws for the whole batch of `size` records and returns the rows of ours, so a record has the same
    numbers whichever process, and whichever part of a batch, it is in. `places` int64 [n] says where our records
    stand in the batch; None: they are the whole batch. Rows are drawn anew from `seed` by every new object.
    """

    def __init__(self, seed: int, size: int, places: Tensor | None = None, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._size = size
        self._places = places

    def uniform(self, *shape: int) -> Tensor:
        """float32 [n, *shape], uniform in [0, 1)."""
        return self._ours(torch.rand((self._size, *shape), generator=self._generator, device=self.device))

    def normal(self, *shape: int) -> Tensor:
        """float32 [n, *shape], standard normal."""
        return self._ours(torch.randn((self._size, *shape), generator=self._generator, device=self.device))

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 [n, *shape], uniform in 0..high - 1."""
        return self._ours(torch.randint(high, (self._size, *shape), generator=self._generator, device=self.device))

    def _ours(self, whole: Tensor) -> Tensor:
        return whole if self._places is None else whole[self._places]
