"""A SiT-style linear transport on the pairs of a store: `python examples/sit_transport.py STORE`.

Convention: that of SiT's code (willisma/SiT, transport/): t = 0 is the noise (x0), t = 1 is the image (x1),
x_t = t x1 + (1 - t) x0, and the velocity u_t = x1 - x0 points from noise to data. SiT's paper (arXiv 2401.08740) writes
time the other way round, as we do: our t is 1 - t of the code, our velocity has the other sign.

In SiT itself one line changes: its transport draws `x0 = randn_like(x1)`; take the pair's noise instead.
"""

from __future__ import annotations

import sys
from itertools import islice

import torch
from network import Velocity
from torch import Tensor, nn

from nfm.storage import PairStore


class LinearTransport:
    """The straight line with velocity prediction, in the names of SiT's code."""

    def plan(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, u_t) at t [B] between noise x0 and image x1 [B, ...]; alpha_t = t, sigma_t = 1 - t."""
        t = t.view(-1, *[1] * (x1.ndim - 1))
        return t * x1 + (1 - t) * x0, x1 - x0

    def training_losses(self, model: nn.Module, x1: Tensor, x0: Tensor, y: Tensor) -> Tensor:
        """|| g(x_t, t, y) - u_t ||^2 by record: float32 [B]. SiT's own has no x0, it draws one."""
        t = torch.rand(len(x1))
        x_t, u_t = self.plan(t, x0, x1)
        return (model(x_t, t, y) - u_t).square().flatten(1).mean(dim=1)

    @torch.no_grad()
    def sample_ode(self, model: nn.Module, x0: Tensor, y: Tensor, num_steps: int = 8) -> Tensor:
        """Images [B, ...] from noise x0 by Euler steps from t = 0 up to t = 1."""
        x = x0
        for step in range(num_steps):
            t = torch.full((len(x),), step / num_steps)
            x = x + model(x, t, y) / num_steps
        return x


def loss(model: nn.Module, image: Tensor, noise: Tensor, label: Tensor) -> Tensor:
    """SiT's loss of a batch, a scalar; image, noise float32 [B, ...]."""
    return LinearTransport().training_losses(model, x1=image, x0=noise, y=label).mean()


def sample(model: nn.Module, noise: Tensor, label: Tensor, steps: int = 8) -> Tensor:
    """Images [B, ...] from noise."""
    return LinearTransport().sample_ode(model, noise, label, steps)


def train(path: str, steps: int = 200) -> tuple[nn.Module, float]:
    """The model after some steps on a store, and its last loss."""
    store = PairStore.open(path)
    model = Velocity(store.spec.image_shape, store.spec.classes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in islice(store.batches(batch_size=128, seed=0, epochs=None, device="cpu"), steps):
        value = loss(model, batch.image, batch.noise, batch.label)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model, value.item()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(f"loss {train(sys.argv[1])[1]:.4f}")
