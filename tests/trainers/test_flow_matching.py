"""Flow matching against a case with a closed form: Gaussian data, independent Gaussian noise."""

import math

import torch
from torch import Tensor, nn

from nfm.trainers.flow_matching import interpolate, loss, sample_times
from nfm.trainers.solvers import sample
from nfm.trainers.training.randomness import Randomness

MEAN, STD = 2.0, 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Exact(nn.Module):
    """E[z - x | x_t] for x ~ N(MEAN, STD^2) and z ~ N(0, 1), a linear regression at each t."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        t = t[:, None]
        variance = (1 - t) ** 2 * STD**2 + t**2
        return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def residual(t: Tensor) -> Tensor:
    """Var[z - x | x_t]: what no velocity can predict."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return 1 + STD**2 - (t - (1 - t) * STD**2) ** 2 / variance


class Recorder(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.x, self.t, self.y = x, t, y
        return torch.zeros_like(x)


def test_times_are_logit_normal_around_minus_a_fifth() -> None:
    logits = torch.logit(sample_times(Randomness(0, 100_000)).double())
    assert abs(logits.mean() + 0.2) < 0.015
    assert abs(logits.std() - 1) < 0.015


def test_time_zero_is_the_image_and_time_one_the_noise() -> None:
    image, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    x = interpolate(image, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(x, torch.stack([image[0], 0.75 * image[1] + 0.25 * noise[1], noise[2]]))


def test_the_exact_velocity_has_the_least_loss_there_is() -> None:
    n = 200_000
    image, noise = MEAN + STD * torch.randn(n, 1, generator=seeded(1)), torch.randn(n, 1, generator=seeded(2))
    label = torch.zeros(n, dtype=torch.int64)
    value = loss(Exact(), image, noise, label, Randomness(3, n))
    assert math.isclose(value, residual(sample_times(Randomness(3, n))).mean(), rel_tol=0.02)
    shifted = Exact()
    shifted.register_forward_hook(lambda module, inputs, output: output + 0.2)
    assert loss(shifted, image, noise, label, Randomness(3, n)) > value + 0.03


def test_training_on_pairs_recovers_the_data() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))

    class Velocity(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            return layers(torch.cat([x, t[:, None]], dim=1))

    model, generator = Velocity(), seeded()
    optimizer = torch.optim.Adam(layers.parameters(), lr=5e-3)
    for step in range(1000):
        image, noise = (torch.randn(512, 1, generator=generator) for _ in range(2))
        optimizer.zero_grad()
        value = loss(model, MEAN + STD * image, noise, torch.zeros(512, dtype=torch.int64), Randomness(step, 512))
        value.backward()
        optimizer.step()
    z = torch.randn(4000, 1, generator=generator)
    x = sample(lambda x, t: model(x, torch.full((len(x),), t)), z, 31, "heun")
    assert abs(x.mean() - MEAN) < 0.1
    assert abs(x.std() - STD) < 0.1


def test_a_tenth_of_the_labels_is_dropped_and_the_rest_kept() -> None:
    model, label = Recorder(), torch.arange(20_000) % 7
    image = torch.zeros(20_000, 1)
    loss(model, image, image, label, Randomness(0, 20_000))
    dropped = model.y == -1
    assert abs(dropped.float().mean() - 0.1) < 0.01
    assert torch.equal(model.y[~dropped], label[~dropped])
    loss(model, image, image, label, Randomness(0, 20_000), label_drop=0.0)
    assert torch.equal(model.y, label)


def test_the_seed_alone_decides_a_step() -> None:
    image, noise, label = torch.randn(8, 1), torch.randn(8, 1), torch.zeros(8, dtype=torch.int64)
    torch.manual_seed(1)
    first = loss(Exact(), image, noise, label, Randomness(0, 8))
    torch.manual_seed(2)
    assert torch.equal(first, loss(Exact(), image, noise, label, Randomness(0, 8)))
    assert not torch.equal(first, loss(Exact(), image, noise, label, Randomness(1, 8)))
