"""Solvers: order of convergence, the NFE that they say, and curvature with a closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nfm.trainers.solvers import Counted, curvature, euler, heun, sample, square_times, uniform_times

Z = torch.tensor([[1.0, -0.5]], dtype=torch.float64)


def bent(x: Tensor, t: float) -> Tensor:
    """dx/dt = -2 t x, so x(0) = x(1) e."""
    return -2 * t * x


def straight(x: Tensor, t: float) -> Tensor:
    return torch.full_like(x, 3.0)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("times", [uniform_times, square_times])
def test_halving_the_step_shows_the_solvers_order(
    solver: Callable[..., Tensor], order: int, times: Callable[[int], list[float]]
) -> None:
    coarse, fine = ((solver(bent, Z, times(n)) - math.e * Z).abs().max().item() for n in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("intervals", [1, 2, 8])
def test_euler_takes_n_evaluations_and_heun_2n_minus_1(intervals: int) -> None:
    for solver, nfe in ((euler, intervals), (heun, 2 * intervals - 1)):
        counted = Counted(bent)
        solver(counted, Z, square_times(intervals))
        assert counted.nfe == nfe


@pytest.mark.parametrize(("nfe", "sampler"), [(31, "heun"), (15, "heun"), (7, "heun"), (5, "euler"), (1, "heun")])
def test_a_sample_takes_exactly_the_evaluations_asked_for(nfe: int, sampler: str) -> None:
    counted = Counted(straight)
    x = sample(counted, Z, nfe, sampler)
    assert counted.nfe == nfe
    torch.testing.assert_close(x, Z - 3.0)


def test_times_descend_from_one_to_zero_as_squares() -> None:
    assert square_times(4) == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="use an odd number"):
        sample(bent, Z, 8, "heun")
    with pytest.raises(ValueError, match="nfe = 0"):
        sample(bent, Z, 0, "euler")
    with pytest.raises(ValueError, match="'dpm' is unknown"):
        sample(bent, Z, 8, "dpm")


def test_straight_paths_have_no_curvature() -> None:
    assert curvature(straight, Z).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps", [8, 128])
def test_curvature_is_the_variance_of_the_velocity_along_the_path(steps: int) -> None:
    value = curvature(lambda x, t: 5 + 2 * t * torch.ones_like(x), Z.float(), steps)
    expected = 2**2 * (1 - steps**-2) / 12  # the variance of `steps` uniform times
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_curvature_is_a_mean_over_paths_and_dimensions() -> None:
    rates = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    value = curvature(lambda x, t: rates * t, torch.zeros(2, 2), 128)
    assert value.item() == pytest.approx(4**2 / 12 / 4, rel=1e-3)
