"""Solvers: order of convergence, the NFE that they say, and curvature with a closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nfm.trainers import nfe as costs
from nfm.trainers.solvers import (
    DIFFUSIONS,
    GRIDS,
    SOLVERS,
    STOCHASTIC,
    Counted,
    curvature,
    dopri5,
    euler,
    heun,
    midpoint,
    rk4,
    sample,
    square_times,
    uniform_times,
)

Z = torch.tensor([[1.0, -0.5]], dtype=torch.float64)


def bent(x: Tensor, t: float) -> Tensor:
    """dx/dt = -2 t x, so x(0) = x(1) e."""
    return -2 * t * x


def straight(x: Tensor, t: float) -> Tensor:
    return torch.full_like(x, 3.0)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (midpoint, 2), (rk4, 4)])
@pytest.mark.parametrize("times", GRIDS.values())
def test_halving_the_step_shows_the_solvers_order(
    solver: Callable[..., Tensor], order: int, times: Callable[[int], list[float]]
) -> None:
    coarse, fine = ((solver(bent, Z, times(n)) - math.e * Z).abs().max().item() for n in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("times", GRIDS.values())
@pytest.mark.parametrize(("name", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("rk4", "rk4")])
def test_torchdiffeq_takes_the_same_fixed_steps(name: str, theirs: str, times: Callable[[int], list[float]]) -> None:
    odeint_fixed = pytest.importorskip("torchdiffeq").odeint
    grid = times(8)
    # Its own rk4 is the 3/8 rule, of the same order: the difference is of the size of the error there.
    expected = odeint_fixed(
        lambda t, x: torch.sin(3 * x) - t, Z, torch.tensor(grid, dtype=torch.float64), method=theirs
    )[-1]
    found = SOLVERS[name](lambda x, t: torch.sin(3 * x) - t, Z, grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if name == "rk4" else 1e-12)


def test_adaptive_dopri5_is_the_solution_and_stays_between_noise_and_image() -> None:
    pytest.importorskip("torchdiffeq")
    times: list[float] = []

    def watched(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return bent(x, t)

    coarse, few = dopri5(watched, Z, rtol=1e-3, atol=1e-3)
    fine, many = dopri5(watched, Z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fine, math.e * Z, rtol=0, atol=1e-7)
    assert 1e-7 < (coarse - math.e * Z).abs().max() < 1e-2
    assert few < many
    assert few + many == len(times)
    assert 0 <= min(times) <= max(times) <= 1


@pytest.mark.parametrize("intervals", [1, 2, 8])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_takes_the_evaluations_that_it_states(name: str, intervals: int) -> None:
    counted = Counted(bent)
    cost = costs.COSTS[name]
    SOLVERS[name](counted, Z, square_times(intervals))
    stated = {"euler": intervals, "heun": 2 * intervals - 1, "midpoint": 2 * intervals, "rk4": 4 * intervals}[name]
    assert counted.nfe == stated == cost.per_interval * intervals - cost.saved


def test_every_solver_and_grid_has_one_name_everywhere() -> None:
    assert [*SOLVERS, *STOCHASTIC] == list(costs.COSTS)
    assert list(STOCHASTIC) == list(costs.STOCHASTIC)
    assert list(DIFFUSIONS) == list(costs.DIFFUSIONS)
    assert list(GRIDS) == list(costs.GRIDS)


@pytest.mark.parametrize(
    ("nfe", "solver"), [(31, "heun"), (7, "heun"), (1, "heun"), (5, "euler"), (6, "midpoint"), (8, "rk4")]
)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_sample_takes_exactly_the_evaluations_asked_for(nfe: int, solver: str, grid: str) -> None:
    counted = Counted(straight)
    x = sample(counted, Z, nfe, solver, grid)
    assert counted.nfe == nfe
    torch.testing.assert_close(x, Z - 3.0)


def test_the_grid_changes_the_sample() -> None:
    assert not torch.equal(sample(bent, Z, 4, "euler", "square"), sample(bent, Z, 4, "euler", "uniform"))
    torch.testing.assert_close(sample(bent, Z, 4, "euler"), sample(bent, Z, 4, "euler", "square"))


def test_times_descend_from_one_to_zero_as_squares() -> None:
    assert square_times(4) == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("nfe", "solver", "nearest"),
    [(8, "heun", "use 7 or 9"), (7, "midpoint", "use 6 or 8"), (1, "midpoint", "use 2"), (6, "rk4", "use 4 or 8")],
)
def test_an_nfe_that_a_solver_cannot_have_is_refused_with_the_nearest(nfe: int, solver: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"{solver} takes .*{nearest}"):
        sample(bent, Z, nfe, solver)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="nfe = 0"):
        sample(bent, Z, 0, "euler")
    with pytest.raises(ValueError, match="'dpm' is unknown; there are euler"):
        sample(bent, Z, 8, "dpm")
    with pytest.raises(ValueError, match="grid = 'cubic' is unknown; there are uniform, square"):
        sample(bent, Z, 8, "euler", "cubic")


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
