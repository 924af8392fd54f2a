"""A step's random numbers are functions of its seed, on the device that trains."""

from __future__ import annotations

import torch

from nfm.trainers.training.randomness import seed_own


def test_layers_draw_what_they_draw_after_torchs_own_seeding() -> None:
    drawn = []
    for seed in (lambda: torch.manual_seed(7), lambda: seed_own(7, torch.device("cpu"))):
        torch.rand(3)
        seed()
        drawn.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
    assert torch.equal(*drawn)
