"""facebookresearch/flow_matching on the pairs of a store: `python examples/flow_matching_step.py STORE`.

Convention: theirs goes from source to target. t = 0 is the noise (x_0), t = 1 is the image (x_1), and the path's
dx_t = image - noise points to the data. Ours is the mirror image: their t is our 1 - t, their velocity our velocity
with the other sign. CondOTProbPath is the straight line, alpha_t = t and sigma_t = 1 - t. (Package flow_matching; mind
its licence, CC BY-NC.)
"""

from __future__ import annotations

import sys
from itertools import islice

import torch
from flow_matching.path import CondOTProbPath
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from network import Velocity
from torch import Tensor, nn

from nfm.storage import PairStore

PATH = CondOTProbPath()


def loss(model: nn.Module, image: Tensor, noise: Tensor, label: Tensor) -> Tensor:
    """|| g(x_t, t, c) - dx_t ||^2 with their path sample; image, noise float32 [B, ...]."""
    point = PATH.sample(x_0=noise, x_1=image, t=torch.rand(len(image)))
    return (model(point.x_t, point.t, label) - point.dx_t).square().mean()


class Wrapped(ModelWrapper):
    """Their solver gives one t for the whole batch; networks take one a record."""

    def forward(self, x: Tensor, t: Tensor, **extras: Tensor) -> Tensor:
        return self.model(x, t.expand(len(x)), extras["label"])


def sample(model: nn.Module, noise: Tensor, label: Tensor, steps: int = 8) -> Tensor:
    """Images [B, ...] from noise by their ODE solver, from t = 0 up to t = 1."""
    return ODESolver(Wrapped(model)).sample(x_init=noise, step_size=1 / steps, method="euler", label=label)


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
