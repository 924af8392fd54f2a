"""Stochastic solvers on Gaussians, whose velocity is known: the right distribution, the order, and the noise."""

import math

import pytest
import torch
from torch import Tensor

from nfm.trainers import nfe as costs
from nfm.trainers.solvers import DIFFUSIONS, GRIDS, STOCHASTIC, Counted, reverse_drift, sample, square_times

MEAN, DEVIATION = 0.7, 0.4  # of the images


def velocity(x: Tensor, t: float) -> Tensor:
    """E[noise - image | x_t = x]: of Gaussians, a regression on x."""
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    return -MEAN + (t - (1 - t) * DEVIATION**2) / variance * (x - (1 - t) * MEAN)


def moments(solver: str, intervals: int, grid: str, diffusion: str) -> tuple[float, float]:
    """The exact mean and deviation of what a solver makes: it is linear in z and its noises, whose parts are taken."""
    rows = intervals + 2  # nothing, z, and each of the noises
    z = torch.zeros(rows, 1, dtype=torch.float64)
    z[1] = 1

    def fresh(step: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([2 + step]), rows).T.double()

    nfe = costs.COSTS[solver].per_interval * intervals - costs.COSTS[solver].saved
    made = sample(velocity, z, nfe, solver, grid, fresh, diffusion)[:, 0]
    return float(made[0]), float((made[1:] - made[0]).square().sum().sqrt())


def test_the_score_is_the_gradient_of_the_log_density():
    t, x = 0.3, torch.linspace(-2, 2, 9, dtype=torch.float64)
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    score = -(x - (1 - t) * MEAN) / variance
    drift = reverse_drift(velocity, x, t, lambda _: 0.8)
    torch.testing.assert_close(drift, velocity(x, t) - 0.8 * score)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_fine_steps_give_the_mean_and_the_deviation_of_the_images(solver: str, diffusion: str):
    for grid in GRIDS:
        mean, deviation = moments(solver, 1000, grid, diffusion)
        assert mean == pytest.approx(MEAN, abs=5e-3), grid
        assert deviation == pytest.approx(DEVIATION, abs=5e-3), grid


@pytest.mark.parametrize(("solver", "diffusion"), [
    *(("sde-euler", name) for name in DIFFUSIONS),
    *(("sde-heun", name) for name in ("sigma", "constant", "sin^2")),  # of the other, the first order cancels here
])  # fmt: skip
def test_halving_the_step_halves_the_error(solver: str, diffusion: str):
    coarse, fine = (abs(moments(solver, intervals, "square", diffusion)[1] - DEVIATION) for intervals in (200, 400))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("solver", "nfe"), [("sde-euler", 100), ("sde-heun", 99)])
def test_samples_have_the_distribution_of_the_images(solver: str, nfe: int):
    random, parts = torch.Generator().manual_seed(0), torch.tensor([[0.3], [0.7]])
    means, deviations = torch.tensor([[-1.0], [0.8]]), torch.tensor([[0.2], [0.3]])

    def of_two_gaussians(x: Tensor, t: float) -> Tensor:
        variances = (1 - t) ** 2 * deviations**2 + t**2
        away = x - (1 - t) * means
        shares = torch.softmax(parts.log() - variances.log() / 2 - away**2 / (2 * variances), 0)
        return (shares * (-means + (t - (1 - t) * deviations**2) / variances * away)).sum(0)

    z = torch.randn(20_000, generator=random)
    made = sample(of_two_gaussians, z, nfe, solver, "square", lambda _: torch.randn(z.shape, generator=random))
    places = torch.linspace(-2, 2, 81)
    expected = (parts * torch.special.ndtr((places - means) / deviations)).sum(0)
    found = (made[:, None] <= places).double().mean(0)
    assert float((found - expected).abs().max()) < 0.02
    # The noise is new: what is made is no function of z, as it is by an ODE, which keeps the order.
    assert float((made[z.argsort()].diff() < 0).double().mean()) > 0.2


@pytest.mark.parametrize("intervals", [1, 2, 8])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_solver_takes_the_evaluations_that_it_states(name: str, intervals: int):
    counted, steps, z = Counted(velocity), [], torch.zeros(2, 1)

    def fresh(step: int) -> Tensor:
        steps.append(step)
        return torch.zeros_like(z)

    STOCHASTIC[name](counted, z, square_times(intervals), fresh, DIFFUSIONS["sigma"])
    assert counted.nfe == costs.COSTS[name].per_interval * intervals - costs.COSTS[name].saved
    assert steps == list(range(intervals - 1))  # the last step adds none


def test_a_stochastic_solver_without_noise_and_a_diffusion_that_is_unknown_are_refused():
    with pytest.raises(ValueError, match=r"solver = 'sde-euler' adds noise, and there is none; .* take euler, heun"):
        sample(velocity, torch.zeros(1, 1), 4, "sde-euler")
    with pytest.raises(
        ValueError, match=r"diffusion = 'cubic' is unknown; there are sigma, constant, sin\^2, decreasing"
    ):
        sample(velocity, torch.zeros(1, 1), 4, "sde-euler", diffusion="cubic")
