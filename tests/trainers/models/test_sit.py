"""SiT: what its velocity depends on, its start at zero, and its shapes."""

import pytest
import torch

from nfm.trainers.models.sit import SiT


def student(shape: tuple[int, int, int] = (2, 4, 8), classes: int = 3, trained: bool = True) -> SiT:
    torch.manual_seed(0)
    model = SiT(shape, classes, patch=2, width=32, depth=2, head_size=16)
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


X = torch.randn(4, 2, 4, 8, generator=torch.Generator().manual_seed(2))
T = torch.tensor([0.0, 0.3, 0.7, 1.0])
Y = torch.tensor([0, 2, 1, -1])


def test_a_new_student_predicts_zero_and_learns_from_the_first_step() -> None:
    model = student(trained=False)
    velocity = model(X, T, Y)
    assert velocity.shape == X.shape
    assert not velocity.any()
    (velocity - X).square().mean().backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.any()
    assert model.time_in.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_velocity_depends_on_every_patch_the_time_and_the_label() -> None:
    model = student()
    base = model(X, T, Y)
    assert ((model(X, T + 0.01, Y) - base).flatten(1).abs().amax(1) > 1e-3).all()
    assert ((model(X, T, (Y + 2) % 3) - base).flatten(1).abs().amax(1) > 1e-3).all()
    moved = X.clone()
    moved[:, :, -1, -1] += 1
    assert (model(moved, T, Y) - base)[:, :, 0, 0].abs().max() > 1e-4, "attention is not causal"
    swapped = torch.cat([X[..., 2:4], X[..., :2], X[..., 4:]], dim=-1)
    unswapped = model(swapped, T, Y)
    back = torch.cat([unswapped[..., 2:4], unswapped[..., :2], unswapped[..., 4:]], dim=-1)
    assert (back - base).abs().max() > 1e-3, "positions tell patches apart"


def test_impossible_sizes_are_refused_with_the_field_and_value() -> None:
    with pytest.raises(ValueError, match="patch = 3 does not divide the image 8 x 8"):
        SiT((1, 8, 8), 0, patch=3, width=64, depth=1)
    with pytest.raises(ValueError, match="width = 96 is not a multiple of head_size = 64"):
        SiT((1, 8, 8), 0, patch=2, width=96, depth=1)
