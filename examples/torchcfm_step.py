"""TorchCFM on the pairs of a store: `python examples/torchcfm_step.py STORE` (package torchcfm).

Convention: TorchCFM's time goes from source to target. t = 0 is the noise (x0), t = 1 is the image (x1), and the
velocity u_t = x1 - x0 = image - noise points to the data. Ours is the mirror image: their t is our 1 - t, their
velocity our velocity with the other sign. The pairs come coupled, so the plain ConditionalFlowMatcher with sigma 0
takes them as they are; its OT siblings would pair them anew.
"""

from __future__ import annotations

import sys
from itertools import islice

import torch
from network import Velocity
from torch import Tensor, nn
from torchcfm import ConditionalFlowMatcher

from nfm.storage import PairStore

MATCHER = ConditionalFlowMatcher(sigma=0.0)


def loss(model: nn.Module, image: Tensor, noise: Tensor, label: Tensor) -> Tensor:
    """|| g(x_t, t, c) - u_t ||^2 with TorchCFM's x_t and u_t; image, noise float32 [B, ...]."""
    t, x_t, u_t = MATCHER.sample_location_and_conditional_flow(x0=noise, x1=image)
    return (model(x_t, t, label) - u_t).square().mean()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, label: Tensor, steps: int = 8) -> Tensor:
    """Images [B, ...] from noise by Euler steps from t = 0 up to t = 1."""
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), step / steps)
        x = x + model(x, t, label) / steps
    return x


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
