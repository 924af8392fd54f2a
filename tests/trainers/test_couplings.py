"""Couplings: what each pairs with an image, and at what scale."""

import math

import pytest
import torch

from nfm.trainers.couplings import NFM, Independent
from nfm.trainers.tarflow import TarFlow, nll_per_dim

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
Y = torch.tensor([0, 1, 2, 0, 1, 2])
EPS = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def teacher() -> TarFlow:
    torch.manual_seed(0)
    model = TarFlow((1, 8, 8), 3, 2, channels=32, blocks=2, layers=1, head_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_independent_noise_is_eps_and_has_no_likelihood() -> None:
    noise, nll = Independent()(X, Y, EPS)
    assert torch.equal(noise, EPS)
    assert nll.shape == (6,)
    assert nll.isnan().all()


def test_nfm_noise_is_the_teachers_latent_of_the_noised_image_over_sigma_f() -> None:
    model = teacher()
    noise, nll = NFM(model, eta=0.1, sigma_f=1.25)(X, Y, EPS)
    z, logdet = model.encode(X + 0.1 * EPS, Y)
    torch.testing.assert_close(noise, z / 1.25)
    torch.testing.assert_close(nll, nll_per_dim(z, logdet))
    assert not noise.requires_grad


def test_the_measured_sigma_f_gives_noise_of_unit_power() -> None:
    model = teacher()
    sigma_f = model.encode(X + 0.1 * EPS, Y)[0].square().mean().sqrt().item()
    noise, _ = NFM(model, 0.1, sigma_f)(X, Y, EPS)
    assert noise.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_a_flipped_image_has_its_own_noise() -> None:
    coupling = NFM(teacher(), 0.0, 1.0)
    noise, _ = coupling(X, Y, EPS)
    flipped, _ = coupling(X.flip(-1), Y, EPS)
    assert (flipped - noise.flip(-1)).abs().max() > 0.01


@pytest.mark.parametrize("double", [False, True])
def test_noise_and_nll_leave_as_float32(double: bool) -> None:
    coupling = NFM(teacher().double(), 0.1, 1.0) if double else NFM(teacher(), 0.1, 1.0, autocast=torch.bfloat16)
    noise, nll = coupling(X, Y, EPS)
    assert noise.dtype == nll.dtype == torch.float32


@pytest.mark.parametrize("sigma_f", [0.0, math.nan, -1.0])
def test_a_sigma_f_that_is_no_scale_is_refused(sigma_f: float) -> None:
    with pytest.raises(ValueError, match="sigma_f"):
        NFM(teacher(), 0.1, sigma_f)
