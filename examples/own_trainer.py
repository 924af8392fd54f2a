"""Your own student, fed from a pair store: `python examples/own_trainer.py STORE` (a folder or a URL).

Convention: ours. t = 0 is the image, t = 1 is the noise, x_t = (1 - t) image + t noise, and the velocity
dx/dt = noise - image points away from the data: sampling starts at t = 1 and takes steps of -dt.
"""

from __future__ import annotations

import sys
from itertools import islice

import torch
from network import Velocity
from torch import Tensor, nn

from nfm.storage import PairStore


def loss(model: nn.Module, image: Tensor, noise: Tensor, label: Tensor) -> Tensor:
    """|| g(x_t, t, c) - (noise - image) ||^2, the mean over pairs and dimensions; image, noise float32 [B, ...]."""
    t = torch.rand(len(image), *[1] * (image.ndim - 1), device=image.device)
    velocity = model((1 - t) * image + t * noise, t.flatten(), label)
    return (velocity - (noise - image)).square().mean()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, label: Tensor, steps: int = 8) -> Tensor:
    """Images [B, ...] from noise by Euler steps from t = 1 down to t = 0."""
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps, device=x.device)
        x = x - model(x, t, label) / steps
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
