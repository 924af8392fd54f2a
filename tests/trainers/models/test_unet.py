"""The U-Net: shapes on odd sides, its start at zero, labels and their dropping, gradients everywhere, learning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nfm.trainers.models.unet import UNet


def student(shape: tuple[int, int, int] = (2, 7, 10), classes: int = 3, trained: bool = True, depth: int = 1) -> UNet:
    torch.manual_seed(0)
    model = UNet(shape, classes, width=16, depth=depth)
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


X = torch.randn(4, 2, 7, 10, generator=torch.Generator().manual_seed(2))
T = torch.tensor([0.0, 0.3, 0.7, 1.0])
Y = torch.tensor([0, 2, 1, -1])


def changed(after: Tensor, before: Tensor) -> Tensor:
    return (after - before).flatten(1).abs().amax(1)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sides", [(28, 28), (14, 14), (7, 10), (9, 5), (1, 2), (1, 1), (33, 3)])
def test_any_sides_come_back_whatever_they_are_divisible_by(sides: tuple[int, int], depth: int) -> None:
    model = student((3, *sides), depth=depth)
    velocity = model(torch.randn(2, 3, *sides), T[:2], Y[:2])
    assert velocity.shape == (2, 3, *sides)
    assert velocity.isfinite().all()
    assert (velocity != 0).any()


def test_levels_end_where_the_image_is_small() -> None:
    assert [len(UNet((1, side, side), 0, width=8).widths) for side in (2, 4, 8, 14, 28, 64)] == [1, 1, 2, 3, 3, 3]


def test_a_new_student_predicts_zero_and_learns_from_the_first_step() -> None:
    model = student(trained=False)
    velocity = model(X, T, Y)
    assert velocity.shape == X.shape
    assert not velocity.any()
    (velocity - X).square().mean().backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.any()


def test_a_gradient_reaches_every_parameter() -> None:
    model = student(depth=2)
    (model(X, T, Y) - X).square().mean().backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not without


def test_velocity_depends_on_the_whole_image_the_time_and_the_label() -> None:
    model = student()
    base = model(X, T, Y)
    assert (changed(model(X, T + 0.01, Y), base) > 1e-3).all()
    assert (changed(model(X, T, (Y + 2) % 3), base) > 1e-3).all()
    moved = X.clone()
    moved[:, :, -1, -1] += 1
    assert (model(moved, T, Y) - base)[:, :, 0, 0].abs().max() > 1e-5


def test_it_overfits_a_tiny_set() -> None:
    model = student(trained=False)
    target = torch.randn(X.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0)
    for _ in range(75):
        error = (model(X, T, Y) - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.05


def test_impossible_sizes_are_refused_with_the_field_and_value() -> None:
    with pytest.raises(ValueError, match="width = 20 of a U-Net is not a multiple of 8"):
        UNet((1, 8, 8), 0, width=20)
