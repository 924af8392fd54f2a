"""What every student architecture promises, whatever is inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nfm.trainers.models.sit import SiT
from nfm.trainers.models.unet import UNet

T = torch.tensor([0.0, 0.3, 0.7, 1.0])
Y = torch.tensor([0, 2, 1, -1])


def student(arch: str, classes: int = 3) -> tuple[nn.Module, Tensor]:
    """A student whose weights are no longer those of its start, and images for it."""
    torch.manual_seed(0)
    shape = (2, 4, 8) if arch == "sit" else (2, 7, 10)
    model = SiT(shape, classes, patch=2, width=32, depth=2, head_size=16) if arch == "sit" else UNet(shape, classes, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["sit", "unet"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_no_label_is_the_null_label_and_drops_it(arch: str) -> None:
    model, x = student(arch)
    dropped = model(x, T, torch.full((4,), -1))
    torch.testing.assert_close(model(x, T), dropped)
    changed = (model(x, T, Y) - dropped).flatten(1).abs().amax(1)
    assert (changed > 1e-3).tolist() == [True, True, True, False]


def test_an_unconditional_student_ignores_labels(arch: str) -> None:
    model, x = student(arch, classes=0)
    torch.testing.assert_close(model(x, T), model(x, T, Y))


def test_an_image_does_not_depend_on_its_batch(arch: str) -> None:
    model, x = student(arch)
    atol = 1e-5 if arch == "sit" else 1e-4
    torch.testing.assert_close(model(x, T, Y)[1:2], model(x[1:2], T[1:2], Y[1:2]), rtol=0, atol=atol)


def test_velocity_is_float32_under_bfloat16_autocast_and_float64_agrees(arch: str) -> None:
    model, x = student(arch)
    single = model(x, T, Y)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model(x, T, Y)
    assert half.dtype == torch.float32
    assert (half - single).abs().max() < (0.1 if arch == "sit" else 0.05 * single.abs().max())
    rtol = 0 if arch == "sit" else 1e-4
    torch.testing.assert_close(model.double()(x.double(), T.double(), Y).float(), single, rtol=rtol, atol=1e-4)
