"""Every training example regresses the velocity of its own convention, and its sampler goes from noise to data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nfm.storage import PairStore

# Where time starts with the data (ours), dx/dt = noise - image; where it starts with the noise, image - noise.
FROM_DATA, FROM_NOISE = 1.0, -1.0
CONVENTIONS = {
    "own_trainer": FROM_DATA,
    "torchcfm_step": FROM_NOISE,
    "flow_matching_step": FROM_NOISE,
    "sit_transport": FROM_NOISE,
}


class Straight(torch.nn.Module):
    """The true velocity of a batch of pairs, times a sign; remembers where and when it was asked."""

    def __init__(self, image: Tensor, noise: Tensor, sign: float) -> None:
        super().__init__()
        self.velocity = sign * (noise - image)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert t.shape == label.shape == (len(x),)
        self.asked.append((x.clone(), t.clone()))
        return self.velocity


@pytest.fixture
def pairs(store: Callable[[str], Path]) -> tuple[Tensor, Tensor, Tensor]:
    """image, noise and label of one batch."""
    batch = next(PairStore.open(store("blocks")).batches(128, device="cpu"))
    return batch.image, batch.noise, batch.label


@pytest.fixture(params=CONVENTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_regressed_velocity_has_the_sign_of_the_convention(
    name: str, example: Callable[[str], ModuleType], pairs: tuple[Tensor, Tensor, Tensor]
) -> None:
    image, noise, label = pairs
    right = Straight(image, noise, CONVENTIONS[name])
    wrong = Straight(image, noise, -CONVENTIONS[name])
    assert example(name).loss(right, image, noise, label) < 1e-10
    assert example(name).loss(wrong, image, noise, label) > 1


def test_the_line_starts_and_ends_where_the_convention_says(
    name: str, example: Callable[[str], ModuleType], pairs: tuple[Tensor, Tensor, Tensor]
) -> None:
    image, noise, label = pairs
    model = Straight(image, noise, CONVENTIONS[name])
    example(name).loss(model, image, noise, label)
    ((x, t),) = model.asked
    to_noise = t if CONVENTIONS[name] == FROM_DATA else 1 - t
    to_noise = to_noise.view(-1, 1, 1, 1)
    assert t.min() < 0.1
    assert t.max() > 0.9
    torch.testing.assert_close(x, (1 - to_noise) * image + to_noise * noise)


def test_the_first_step_goes_towards_the_image_and_the_last_arrives(
    name: str, example: Callable[[str], ModuleType], pairs: tuple[Tensor, Tensor, Tensor]
) -> None:
    image, noise, label = pairs
    model = Straight(image, noise, CONVENTIONS[name])
    found = example(name).sample(model, noise, label, steps=8)
    torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    first, second = model.asked[0], model.asked[1]
    start = 1.0 if CONVENTIONS[name] == FROM_DATA else 0.0
    assert torch.equal(first[0], noise)
    assert (first[1] == start).all()
    torch.testing.assert_close(second[0], noise + (image - noise) / 8)


def test_sampling_with_a_trained_model_leads_from_the_noise_to_the_image(
    name: str, example: Callable[[str], ModuleType], store: Callable[[str], Path], pairs: tuple[Tensor, Tensor, Tensor]
) -> None:
    image, noise, label = pairs
    torch.manual_seed(0)
    model, loss = example(name).train(str(store("blocks")), steps=150)
    found = example(name).sample(model, noise, label)
    assert loss < 0.3 * (noise - image).square().mean()
    assert (found - image).square().mean() < 0.3 * (noise - image).square().mean()


@pytest.mark.parametrize("layout", ["samples", "zarr"])
def test_a_trainer_reads_every_layout_alike(
    layout: str, example: Callable[[str], ModuleType], store: Callable[[str], Path]
) -> None:
    losses = []
    for each in ("blocks", layout):
        torch.manual_seed(0)
        losses.append(example("own_trainer").train(str(store(each)), steps=5)[1])
    assert losses[0] == losses[1]
