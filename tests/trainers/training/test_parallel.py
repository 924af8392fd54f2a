"""The promises of training on several processes: the same result as one, whichever way the model is shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nfm.trainers.loop import How
from tests.trainers.training.processes import BATCH, Run, done

FSDP = How(sharding="fsdp")
WAYS = {
    "two": (2, How()),
    "four": (4, How()),
    "two-fsdp": (2, FSDP),
    "four-fsdp": (4, FSDP),
    "microbatches": (1, How(microbatch=3)),
    "two-microbatches": (2, How(microbatch=3)),
    "two-fsdp-microbatches": (2, How(sharding="fsdp", microbatch=3)),
    "recomputed": (1, How(recompute=True)),
    "two-fsdp-recomputed": (2, How(sharding="fsdp", recompute=True)),
}
FEW = ("two", "four-fsdp")
ALL = [("teacher", torch.float64, way) for way in WAYS] + [
    (model, dtype, way)
    for model, dtype in (("teacher", torch.float32), ("student", torch.float64), ("student", torch.float32))
    for way in FEW
]


def name_of(model: str, dtype: torch.dtype, way: str) -> str:
    return f"{model}-{str(dtype)[-2:]}-{way}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    runs = []
    for model, dtype in dict.fromkeys((model, dtype) for model, dtype, _ in ALL):
        runs.append(Run(name_of(model, dtype, "alone"), model=model, dtype=dtype))
    for model, dtype, way in ALL:
        runs.append(Run(name_of(model, dtype, way), *WAYS[way], model, dtype))
    runs.append(Run(name_of("teacher", torch.float32, "two-fsdp"), *WAYS["two-fsdp"]))
    for way in ("two", "two-fsdp"):
        runs.append(Run(f"stopped-{way}", 2, WAYS[way][1], steps=20))
        runs.append(Run(f"again-{way}", 2, WAYS[way][1], after=f"stopped-{way}"))
    for processes, way, then in ((4, How(), "ddp"), (4, FSDP, "fsdp"), (1, How(), "alone")):
        before = f"stopped-at-two-for-{then}"
        runs.append(Run(before, 2, FSDP if then != "ddp" else How(), dtype=torch.float64, steps=20))
        runs.append(Run(f"went-on-{then}", processes, way, dtype=torch.float64, after=before))
    return done(runs, tmp_path_factory.mktemp("parallel"))


def farthest(one: dict[str, Any], other: dict[str, Any], but_keys: bool = False) -> float:
    """The largest difference of any weight. The keys' bias moves no softmax: its gradient is rounding alone, which
    Adam scales to whole steps, so in float32 it may be left out."""
    assert one["weights"].keys() == other["weights"].keys()
    largest = 0.0
    for name, value in one["weights"].items():
        difference = (value - other["weights"][name]).abs()
        if but_keys and name.endswith("qkv.bias"):
            difference = torch.stack(difference.chunk(3))[[0, 2]]
        largest = max(largest, float(difference.max()))
    return largest


@pytest.mark.parametrize(("model", "dtype", "way"), ALL)
def test_any_number_of_processes_and_microbatches_gives_the_same_weights(trained, model, dtype, way):
    alone, shared = trained[name_of(model, dtype, "alone")], trained[name_of(model, dtype, way)]
    assert alone["seen"] == shared["seen"] == 50 * BATCH
    exact = dtype == torch.float64
    assert farthest(alone, shared, but_keys=not exact) < (1e-11 if exact else 1e-5)


def test_the_log_is_that_of_one_process(trained):
    alone = trained[name_of("teacher", torch.float64, "alone")]["lines"]
    for way in WAYS:
        lines = trained[name_of("teacher", torch.float64, way)]["lines"]
        assert len(lines) == len(alone) == 5
        for line, expected in zip(lines, alone, strict=True):
            for key in ("images_seen", "learning_rate", "loss", "grad_norm", "power"):
                assert line[key] == pytest.approx(expected[key], rel=1e-10), (way, key)


@pytest.mark.parametrize("way", ["two", "two-fsdp"])
def test_stopped_and_resumed_by_as_many_processes_equals_undisturbed_bit_for_bit(trained, way):
    stopped, again = trained[f"stopped-{way}"], trained[f"again-{way}"]
    assert BATCH * 20 <= stopped["seen"] <= BATCH * 21  # all stop at the same step, which may be the next one
    assert farthest(again, trained[name_of("teacher", torch.float32, way)]) == 0.0


@pytest.mark.parametrize("then", ["ddp", "fsdp", "alone"])
def test_stopped_with_two_and_resumed_with_four_or_one_goes_on_with_the_same_sequence(trained, then):
    assert trained[f"stopped-at-two-for-{then}"]["seen"] < 50 * BATCH
    assert farthest(trained[f"went-on-{then}"], trained[name_of("teacher", torch.float64, "alone")]) < 1e-11
