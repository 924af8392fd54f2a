"""The promises of the moving average."""

import pytest
import torch
from torch import nn

from nfm.trainers.training.ema import EMA


def test_the_average_is_the_formula_of_its_docstring():
    model = nn.Linear(2, 1, bias=False)
    ema = EMA(model, 0.5)
    expected = model.weight.detach().clone()
    for n in range(1, 20):
        with torch.no_grad():
            model.weight.fill_(float(n))
        ema.update(model)
        decay = min(0.5, n / (n + 9))
        expected = decay * expected + (1 - decay) * n
        assert ema.current_decay() == decay
    torch.testing.assert_close(ema.model.weight, expected)


def test_warm_up_forgets_the_initial_weights():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(1000.0)
    ema = EMA(model, 0.9999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(100):
        ema.update(model)
    torch.testing.assert_close(ema.model.weight, model.weight, rtol=0, atol=1e-3)


def test_half_precision_weights_have_a_float32_average_that_keeps_small_changes():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, 0.999)
    ema.updates = 100_000
    with torch.no_grad():
        model.weight.fill_(1.0078125)
    ema.update(model)
    assert ema.model.weight.dtype == torch.float32
    assert ema.model.weight.item() == pytest.approx(1 + 0.0078125e-3, abs=1e-7)


def test_batch_norm_statistics_are_averaged_and_counters_copied():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    model(torch.randn(8, 2) + 5)
    ema.update(model)
    assert ema.model.num_batches_tracked == 1
    torch.testing.assert_close(ema.model.running_mean, 0.9 * model.running_mean)


def test_what_a_model_puts_in_a_buffers_place_is_averaged():
    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.register_buffer("mean", torch.zeros(1))

    model = Replaces()
    ema = EMA(model, 0.9)
    ema.update(model)
    model.mean = torch.ones(1)
    ema.update(model)
    assert ema.model.mean == pytest.approx(1 - ema.current_decay())


def test_the_average_follows_without_touching_the_model():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    before = model.weight.detach().clone()
    ema.update(model)
    assert torch.equal(model.weight, before)
    assert model.weight.requires_grad
    assert not ema.model.weight.requires_grad


def test_a_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"decay is 1.0"):
        EMA(nn.Linear(1, 1), 1.0)
