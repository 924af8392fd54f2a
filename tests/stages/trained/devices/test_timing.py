"""Times of a plan: what is timed is what would run, in its precision, for seconds at most, and told before."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nfm.stages.base import Unfit
from nfm.stages.trained import features, student, teacher
from nfm.stages.trained.costs import Trial
from nfm.stages.trained.devices import timing
from nfm.stages.trained.devices.timing import Clock, fitting, matrix_rate
from nfm.stages.trained.features import FeaturesConfig
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.teacher import TeacherConfig
from nfm.stages.trained.training.section import TrainingSection

FACTS: dict[str, Any] = {"images": 6000, "image_shape": [1, 8, 8], "classes": 10}
STAGES = {
    "teacher": (teacher, TeacherConfig(patch=2, channels=32, head_size=32, blocks=2, layers=1, batch_size=16)),
    "student": (student, StudentConfig(patch=2, width=32, head_size=32, depth=2, batch_size=16)),
    "unet": (student, StudentConfig(arch="unet", width=16, batch_size=16)),
    "features": (features, FeaturesConfig(batch_size=16)),
}


class Multiplied(TorchDispatchMode):
    """Notes the types of the matrices that are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution):
            self.types |= {part.dtype for part in args[:3] if isinstance(part, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_are_timed_in_the_precision_of_the_config(precision: str) -> None:
    with Multiplied() as seen:
        assert matrix_rate.__wrapped__("cpu", precision) > 0  # type: ignore[arg-type]
    assert seen.types == {getattr(torch, precision)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_is_timed_in_the_precision_of_the_config(stage: str, precision: str) -> None:
    module, config = STAGES[stage]
    told: list[str] = []
    matrix_rate("cpu", precision)  # type: ignore[arg-type]
    with Multiplied() as seen:
        cost = module.cost(config.model_copy(update={"precision": precision}), FACTS, Clock(told.append))
    assert getattr(torch, precision) in seen.types
    assert (torch.bfloat16 in seen.types) == (precision == "bfloat16")
    assert cost.seconds > 0
    assert told == [f"timing a training step of the {module.NAME} on this device in {precision}, 1 s at most ..."]


class Slow(torch.nn.Module):
    """A model of one weight, whose steps take as long as they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))


def slow(seconds: float, flops: float = 1.0, steps: list[float] | None = None) -> Trial:
    def loss(model: Slow, batch: Any, random: Any) -> Any:
        assert batch.image.shape[1:] == (1, 8, 8)
        time.sleep(seconds)
        if steps is not None:
            steps.append(time.perf_counter())
        return model.weight * batch.image.mean(), {}

    return Trial(flops, lambda: (Slow(), loss))


def test_a_rate_is_that_of_the_loop_that_trains() -> None:
    rate = Clock(lambda _: None).training("student", TrainingSection(batch_size=40), FACTS, [slow(0.02)])
    assert 40 / 0.02 / 20 < rate <= 40 / 0.02


def test_a_shallow_model_stands_for_a_large_one_by_their_products() -> None:
    config = TrainingSection(batch_size=40)
    rate = Clock(lambda _: None).training("student", config, FACTS, [slow(9.0, 1e13), slow(0.02)])
    assert 40 / 0.02 / 20 < rate * 1e13 <= 40 / 0.02 * 1.001


def test_timing_ends_in_time_and_leaves_torchs_randomness_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.5)
    before, steps = torch.get_rng_state(), list[float]()
    Clock(lambda _: None).training("student", TrainingSection(), FACTS, [slow(0.1, steps=steps)])
    assert 2 <= len(steps) <= 6
    assert torch.equal(before, torch.get_rng_state())


def test_what_no_step_can_time_follows_from_products() -> None:
    trials = [slow(9.0, 1e18), slow(9.0, 1e17)]
    rate = Clock(lambda _: None).training("student", TrainingSection(), FACTS, trials)
    assert rate == pytest.approx(timing.LARGE * matrix_rate("cpu", "float32") / 3e18)


def test_what_does_not_fit_into_memory_follows_from_products() -> None:
    def loss(*_: object) -> Any:
        raise torch.OutOfMemoryError

    trial = Trial(1e6, lambda: (Slow(), loss))
    rate = Clock(lambda _: None).training("student", TrainingSection(), FACTS, [trial])
    assert rate == pytest.approx(timing.LARGE * matrix_rate("cpu", "float32") / 3e6)


def test_the_largest_that_is_short_is_timed() -> None:
    whole, part = slow(0.0, 1e9), slow(0.0, 1e8)
    short = timing.STEP_SECONDS * timing.EFFICIENCY
    assert fitting([whole, part], 3, 10, 3.01e10 / short) == (whole, 10)
    assert fitting([whole, part], 3, 10, 2.41e10 / short) == (whole, 8), "a smaller batch of the whole"
    assert fitting([whole, part], 3, 10, 2.39e10 / short) == (part, 10)
    assert fitting([whole, part], 3, 4, 1.21e10 / short) == (whole, 4), "all of a small batch"
    assert fitting([whole, part], 3, 10, 0.61e9 / short) == (part, 2)
    assert fitting([whole, part], 3, 10, 1e9) == (part, 1)
    assert fitting([whole, part], 3, 10, 1e8) is None


def test_the_same_is_timed_once() -> None:
    said: list[str] = []
    clock = Clock(said.append)
    rates = {clock.training("student", TrainingSection(seed=seed), FACTS, [slow(0.001)]) for seed in (0, 1)}
    assert len(rates) == len(said) == 1
    clock.training("student", TrainingSection(batch_size=7), FACTS, [slow(0.001)])
    assert len(said) == 2


def test_the_choice_of_images_takes_longer_the_more_there_are() -> None:
    clock = Clock(lambda _: None)
    assert clock.assigning("cpu", 64, 100, 256) > 5 * clock.assigning("cpu", 64, 100_000, 256)


@pytest.mark.parametrize("measure", [lambda clock: clock.assigning("cuda:9", 64, 100, 256)])
def test_a_device_that_is_not_here_is_told(measure: Callable[[Clock], float]) -> None:
    with pytest.raises(Unfit, match="cuda:9"):
        measure(Clock(lambda _: None))
