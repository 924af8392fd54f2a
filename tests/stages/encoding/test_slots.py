"""What a coupling gives is looked at before it becomes records."""

from __future__ import annotations

import math

import pytest
import torch

from nfm.stages.base import StageError
from nfm.stages.encoding import slots
from nfm.trainers.couplings.coupling import Pairs


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_nll_that_is_not_finite_is_refused_and_padding_is_not_looked_at(bad: float) -> None:
    pairs = Pairs(torch.zeros(4, 1, 2, 2), torch.tensor([0.5, 1.0, bad, bad]))
    kept = slots.found(pairs, 2)
    assert kept.nll is not None
    assert kept.nll.tolist() == [0.5, 1.0]
    with pytest.raises(StageError, match="the teacher's nll of 1 of 3 images is not finite"):
        slots.found(pairs, 3)
    assert slots.found(Pairs(torch.zeros(4, 1, 2, 2)), 4).nll is None
