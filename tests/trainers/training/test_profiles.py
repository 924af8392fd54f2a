"""The promises of moving averages by a power of time: their profile, and combinations that nobody tracked."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nfm.trainers.training.ema import EMA, PowerEMA
from nfm.trainers.training.profiles import Profile, combination, gamma_of

BATCH = 10


def walk(steps: int, seed: int = 0) -> torch.Tensor:
    """The weight after each step: one that wanders."""
    return torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(0)


def tracked(path: torch.Tensor, width: float, batch: int = BATCH) -> list[float]:
    """The average after each step."""
    model = nn.Linear(1, 1, bias=False).double()
    average, found = PowerEMA(model, width), []
    for step, value in enumerate(path, 1):
        nn.init.constant_(model.weight, float(value))
        average.update(model, step * batch, batch)
        found.append(average.model.weight.item())
    return found


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_average_has_the_profile_of_its_width(width):
    # The part of each step's weight in the average at the end, by steps of a weight that is 1 once.
    steps, gamma = 400, gamma_of(width)
    parts = [tracked(torch.eye(steps, dtype=torch.float64)[step], width)[-1] for step in range(0, steps, 25)]
    at = np.arange(0, steps, 25) + 0.5
    expected = (gamma + 1) * (at / steps) ** gamma / steps
    np.testing.assert_allclose(parts, expected, atol=0.01 * max(expected))


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_exponents_are_those_of_the_paper(width, gamma):
    assert gamma_of(width) == pytest.approx(gamma, abs=5e-3)
    # What the width is said to be: the deviation of the profile, a Beta(gamma + 1, 1) distribution.
    s = (np.arange(10**6) + 0.5) / 10**6
    mass = s ** gamma_of(width)
    mean = (s * mass).sum() / mass.sum()
    assert np.sqrt(((s - mean) ** 2 * mass).sum() / mass.sum()) == pytest.approx(width, rel=1e-5)


def test_the_first_step_forgets_the_initial_weights():
    model = nn.Linear(3, 2)
    average = PowerEMA(model, 0.1)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    average.update(model, BATCH, BATCH)
    for mine, other, now in zip(average.model.parameters(), before.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, now)
        assert not torch.equal(mine, other)


def test_examples_count_and_not_batches():
    """Weights that stay for two small batches are averaged as those of one batch of twice the size."""
    path = walk(50)
    small = tracked(path.repeat_interleave(2), 0.1, BATCH)
    np.testing.assert_allclose(small[1::2], tracked(path, 0.1, 2 * BATCH), rtol=1e-12)


@pytest.mark.parametrize("wanted", [0.03, 0.07, 0.12, 0.15])
def test_a_combination_of_snapshots_is_the_average_that_nobody_tracked(wanted):
    steps, every, widths = 3200, 200, (0.05, 0.1)
    path = walk(steps)
    of_widths = {width: tracked(path, width) for width in widths}
    known = [Profile(step * BATCH, width) for step in range(every, steps + 1, every) for width in widths]
    weights, error = combination(known, Profile(steps * BATCH, wanted))
    snapshots = [of_widths[one.width][int(one.seen) // BATCH - 1] for one in known]
    direct = tracked(path, wanted)[-1]
    assert sum(weights) == pytest.approx(1)
    assert error < 0.05
    near = abs(np.dot(weights, snapshots) - direct)
    assert near < 0.02 * float(path.std())
    assert near < 0.5 * min(abs(of_widths[width][-1] - direct) for width in widths)


def test_a_combination_says_how_wrong_its_profile_is():
    few = [Profile(1000, 0.05), Profile(1000, 0.1)]
    assert combination(few, Profile(1000, 0.05))[1] < 1e-6
    assert combination(few, Profile(1000, 0.25))[1] > 0.5


@pytest.mark.parametrize("width", [0.0, -0.1, 0.2887, float("nan")])
def test_a_width_that_no_profile_has_is_refused(width):
    with pytest.raises(ValueError, match=r"not in \(0, 0.28\]"):
        gamma_of(width)


def test_it_averages_buffers_as_the_other_does():
    model = nn.BatchNorm1d(2)
    one, other = PowerEMA(model, 0.1), EMA(model, 0.0)
    model(torch.randn(8, 2) + 5)
    one.update(model, BATCH, BATCH)
    other.update(model)
    assert one.model.num_batches_tracked == other.model.num_batches_tracked == 1
    assert torch.equal(one.model.running_mean, model.running_mean)
