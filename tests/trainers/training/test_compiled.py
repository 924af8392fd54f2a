"""Compiled models on several processes: the weights are those of one, and near those that are not compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nfm.trainers.loop import How
from tests.trainers.training.processes import BATCH, Run, done
from tests.trainers.training.test_parallel import farthest

pytestmark = [pytest.mark.long, pytest.mark.seconds(900)]  # a compiler of C++ runs for each process
COMPILED = How(compile=True)


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_a_compiled_model_trains_alike_on_one_process_and_on_two_shared_either_way(model: str, tmp_path: Path) -> None:
    plain = Run("plain", 1, How(), model, torch.float64, steps=12, whole=12)
    ways = {"alone": (1, COMPILED), "ddp": (2, COMPILED), "fsdp": (2, How(sharding="fsdp", compile=True))}
    runs = [replace(plain, name=name, processes=processes, how=how) for name, (processes, how) in ways.items()]
    found = done([plain, *runs], tmp_path)
    assert all(found[name]["seen"] == 12 * BATCH for name in found)
    # Sizes of times and places are float32 inside the models, which the compiler orders in its own way.
    assert farthest(found["plain"], found["alone"]) < 1e-5
    for name in ("ddp", "fsdp"):
        assert farthest(found["alone"], found[name]) < 1e-11, name
