"""What a plan says of a device's memory: of a shallow model for the deep one, and which settings make it fit."""

from __future__ import annotations

import pytest
import torch

from nfm.stages.trained.costs import Trial
from nfm.stages.trained.devices import memory, timing
from nfm.stages.trained.devices.memory import Memory
from nfm.stages.trained.teacher import TeacherConfig
from nfm.trainers.models.tarflow import TarFlow, nll_per_dim

FACTS = {"image_shape": [1, 16, 16], "classes": 3}
GB = 10**9


def loss(model, batch, random):
    return nll_per_dim(*model.encode(batch.image, batch.label)).mean(), {}


def trial(blocks: int, layers: int) -> Trial:
    return Trial(float(blocks * layers), lambda: (TarFlow((1, 16, 16), 3, 2, 32, blocks, layers, head_size=16), loss))


def test_a_shallow_model_stands_for_the_memory_of_a_deep_one() -> None:
    batch, config = timing.random_batch(4, FACTS, "cpu"), TeacherConfig()
    deep, shallow = trial(4, 4), trial(1, 2)
    whole = memory.measured([deep], 1000, config, batch)
    found = memory.measured([deep, shallow], 1000, config, batch)
    assert found.state == whole.state == 20_000
    assert found.record == pytest.approx(whole.record, rel=0.2)
    assert found.recomputed == pytest.approx(whole.recomputed, rel=0.4)
    assert found.recomputed < found.record / 3


def test_what_is_kept_is_what_torch_keeps() -> None:
    width = 100
    model = torch.nn.Sequential(torch.nn.Linear(256, width), torch.nn.ReLU())

    def square(model, batch, random):
        return model(batch.image.flatten(1)).square().mean(), {}

    batch = timing.random_batch(4, FACTS, "cpu")
    found = memory.measured([Trial(1.0, lambda: (model, square))], 0, TeacherConfig(), batch)
    assert found.record == 4 * (256 + width)  # the input of the product, and the result of the ReLU, once


@pytest.mark.parametrize(
    ("settings", "room", "told"),
    [
        ({}, 100, "fits 100 GB"),
        ({}, 60, "does not fit 60 GB; it would with microbatch = 16"),
        ({}, 25, "does not fit 25 GB; it would with microbatch = 2"),
        ({"microbatch": 8}, 21.5, "does not fit 21.5 GB; it would with microbatch = 1, recompute = true"),
        ({"workers": 4}, 19, 'does not fit 19 GB; it would with sharding = "fsdp", microbatch = 4'),
        ({"workers": 4, "sharding": "fsdp"}, 1, "does not fit 1 GB with any setting; take more workers"),
        ({}, 10, 'does not fit 10 GB with any setting; take more workers with sharding = "fsdp"'),
    ],
)
def test_the_first_setting_that_makes_it_fit_is_named(settings: dict, room: float, told: str) -> None:
    needed = Memory(state=20 * GB, record=2 * GB, recomputed=GB)
    config = TeacherConfig(batch_size=32, **settings)
    assert needed.advice(config, room * GB) == told
