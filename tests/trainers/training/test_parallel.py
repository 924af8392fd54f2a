"""The promises of training on several processes: the same result as one, whichever way the model is shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nfm.trainers.loop import How
from tests.support.sizes import FULL
from tests.trainers.training.processes import BATCH, STEPS, Run, done

FSDP = How(sharding="fsdp")
pytestmark = pytest.mark.seconds(120)  # processes that import torch
WAYS = {
    "two": (2, How()),
    "four": (4, How()),
    "two-fsdp": (2, FSDP),
    "four-fsdp": (4, FSDP),
    "microbatches": (1, How(microbatch=3)),
    "two-microbatches": (2, How(microbatch=3)),
    "recomputed": (1, How(recompute=True)),
    "two-all": (2, How(sharding="fsdp", microbatch=3, recompute=True)),
}
STOP = STEPS * 2 // 5  # where a training is stopped
F32, F64 = torch.float32, torch.float64
ALL = [("teacher", F64, "two"), ("teacher", F64, "two-all"), ("teacher", F32, "two-fsdp"), ("features", F64, "two")]
if FULL:  # `make test-all`
    ALL += [("teacher", F64, way) for way in WAYS if way not in ("two", "two-all")]
    ALL += [("student", F64, "two"), ("student", F64, "four-fsdp"), ("student", F32, "two")]
    ALL += [("teacher", F32, "four"), ("features", F64, "four")]
THEN = {"ddp": (4, How()), "fsdp": (4, FSDP), "alone": (1, How())} if FULL else {"alone": (1, How())}


def name_of(model: str, dtype: torch.dtype, way: str) -> str:
    return f"{model}-{str(dtype)[-2:]}-{way}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    runs = [
        Run(name_of(model, dtype, "alone"), model=model, dtype=dtype)
        for model, dtype in dict.fromkeys((model, dtype) for model, dtype, _ in ALL)
    ]
    runs += [Run(name_of(model, dtype, way), *WAYS[way], model, dtype) for model, dtype, way in ALL]
    runs.append(Run("stopped", 2, FSDP, steps=STOP))
    runs.append(Run("again", 2, FSDP, after="stopped"))
    for then, (processes, how) in THEN.items():
        before = f"stopped-for-{then}"
        runs.append(Run(before, 2, how, dtype=F64, steps=STOP))
        runs.append(Run(f"went-on-{then}", processes, how, dtype=F64, after=before))
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
    assert alone["seen"] == shared["seen"] == STEPS * BATCH
    exact = dtype == torch.float64
    assert farthest(alone, shared, but_keys=not exact) < (1e-11 if exact else 1e-5)


def test_the_log_is_that_of_one_process(trained):
    alone = trained[name_of("teacher", F64, "alone")]["lines"]
    for way in [way for model, dtype, way in ALL if (model, dtype) == ("teacher", F64)]:
        lines = trained[name_of("teacher", F64, way)]["lines"]
        assert len(lines) == len(alone) == STEPS // 10
        for line, expected in zip(lines, alone, strict=True):
            for key in ("images_seen", "learning_rate", "loss", "grad_norm", "power"):
                assert line[key] == pytest.approx(expected[key], rel=1e-10), (way, key)


def test_stopped_and_resumed_by_as_many_processes_equals_undisturbed_bit_for_bit(trained):
    assert (
        BATCH * STOP <= trained["stopped"]["seen"] <= BATCH * (STOP + 1)
    )  # all stop at the same step, which may be the next one
    assert farthest(trained["again"], trained[name_of("teacher", F32, "two-fsdp")]) == 0.0


@pytest.mark.parametrize("then", THEN)
def test_stopped_with_two_and_resumed_with_others_goes_on_with_the_same_sequence(trained, then):
    assert trained[f"stopped-for-{then}"]["seen"] < STEPS * BATCH
    assert farthest(trained[f"went-on-{then}"], trained[name_of("teacher", F64, "alone")]) < 1e-11
