"""How fast this device is, timed for a plan: training steps and evaluations of the very models, matrix products."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Unfit
from nfm.stages.display import units
from nfm.stages.trained.costs import Cost, Trial
from nfm.stages.trained.devices import memory
from nfm.stages.trained.devices.machine import free_memory, is_out_of_memory, pick_device
from nfm.stages.trained.devices.precision import autocast_dtype, check_precision, matrix_products
from nfm.stages.trained.training.section import TrainingSection, whole_batches
from nfm.storage.reading.batch import Batch

if TYPE_CHECKING:
    from nfm.stages.trained.devices.precision import Precision

SECONDS = 2.5  # of one measurement with all that it makes, 3 s with what ends late
STEP_SECONDS = 0.6  # what a step that is timed is to take, by what it multiplies
LEAST_BATCH = 8  # of fewer, what a step does once weighs too much
LONGEST = 1.0  # of a step; where even the smallest is longer, products alone are timed
EFFICIENCY = 0.25  # of the rate of matrix products; small models with attention and norms reached 0.2 to 0.35 on CPUs
LARGE = 0.6  # the same of models so large that one layer's step is too long to be timed
FEW_IMAGES = 4096  # that stand for all, from which noises choose
BACKWARD = 3  # a forward and a backward pass are as much as three forward ones


class Clock:
    """Times this device for one plan, each thing once, and says so before by `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._known: dict[str, Any] = {}

    def measured(self, what: str, precision: str, sizes: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What `measure()` gives of this device, with torch's randomness from a seed; as `once`."""

        def seeded() -> Any:
            with _seeded():
                return measure()

        return self.once(f"{what} on this device in {precision}", sizes, seeded)

    def once(self, what: str, sizes: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What `measure()` gives, once for each `sizes`, which are JSON's types."""
        key = json.dumps([what, sizes], sort_keys=True, default=str)
        if key not in self._known:
            self._say(f"timing {what}, {math.ceil(SECONDS)} s at most ...")
            self._known[key] = measure()
        return self._known[key]

    def training(self, stage: str, config: TrainingSection, facts: Mapping[str, Any], trials: Sequence[Trial]) -> float:
        """Examples a second of training the first of `trials`, by the loop that trains, on random data, not compiled.

        Of several workers it is the sum of as many as this device, each with its part of a batch.

        Their `make` gives a model and its loss. The others are shallower models of the same width: one of them is timed
        where a step of the first takes long, and FLOPs make up the difference. Raises Unfit for a device not here.
        """
        device = pick_device(config.device)
        check_precision(device, config.precision)
        left_out = {"seed", "save_every", "log_every", "keep_checkpoints", "ray_address"}
        left_out |= {"watch", "sample_every", "sample_distance"}  # of what looks on
        sizes = {**config.model_dump(exclude=left_out), "shape": facts["image_shape"], "flops": trials[0].flops}
        return float(
            self.measured(
                f"a training step of the {stage}", config.precision, sizes,
                lambda: _training_rate(config, facts, trials, device),
            )
        )  # fmt: skip

    def assigning(self, device: str, values: int, images: int, batch_size: int) -> float:
        """Noises a second that are given the best of so many images of so many values each. Raises Unfit as above."""
        device = pick_device(device)
        sizes = {"values": values, "images": images, "batch_size": batch_size, "device": device}

        def make() -> Callable[[int], object]:
            import torch

            from nfm.trainers.couplings.semidiscrete_targets import Targets

            targets = Targets.of(torch.rand(few, values) * 2 - 1, device=device)
            noise, offsets = torch.randn(batch_size, values, device=device), torch.zeros(few, device=device)
            return lambda size: targets.counts(noise[:size], offsets).cpu()

        few = max(1, min(images, FEW_IMAGES))
        trial = Trial(2.0 * values * few, make)
        rate = self.measured(
            "the choice of images", "float32", sizes, lambda: rate_of_calls([trial], batch_size, device, "float32")
        )
        return float(rate * few / max(images, 1))


def cost_of_training(
    stage: str, config: TrainingSection, examples: int, unit: str, facts: Mapping[str, Any], parameters: int,
    trials: Sequence[Trial], clock: Clock | None,
) -> Cost:  # fmt: skip
    """What training the first of `trials` with `examples` costs, in whole batches; its time where there is a clock."""
    examples = whole_batches(config, examples)
    # A checkpoint holds weights, two moments and moving averages; those are the finished model. All float32.
    averages = 1 + len(config.averages())
    size = 4 * parameters * ((3 + averages) * config.keep_checkpoints + averages)
    words = f"by {config.workers} workers, without what they tell each other" if config.workers > 1 else ""
    if clock is not None or "device_memory" in facts:  # else a plan needs no torch, and runs nothing
        words = ", ".join(part for part in (words, _memory(config, facts, parameters, trials)) if part)
    cost = Cost(examples, unit, words, flops=BACKWARD * examples * trials[0].flops, bytes=size)
    if clock is None:
        return cost
    try:
        return replace(cost, seconds=examples / clock.training(stage, config, facts, trials))
    except Unfit as error:
        return replace(cost, unknown=f"no time ({error})")


def _memory(config: TrainingSection, facts: Mapping[str, Any], parameters: int, trials: Sequence[Trial]) -> str:
    """What a training takes of the memory of each worker's device, and whether it fits."""
    with _seeded():
        found = memory.measured(trials, parameters, config, random_batch(2, facts, "cpu"))
    each = found.of_worker(config.batch_size, config.workers, config.sharding, config.microbatch, config.recompute)
    told = f"{units.size(each)} of memory" + (" a worker" if config.workers > 1 else "")
    try:
        there = memory.device_bytes(pick_device(config.device), facts)
    except Unfit:
        there = memory.device_bytes("cpu", facts)
    return told if there is None else f"{told}, which {found.advice(config, there)}"


def fitting(trials: Sequence[Trial], passes: int, batch_size: int, rate: float) -> tuple[Trial, int] | None:
    """What can be timed, and in which batch: the first with a batch that is short at `rate` FLOP/s and large enough to
    stand for the whole; else the last, in a batch of any size.

    `passes` is how many forward passes a step is worth. None where even a batch of one takes far too long.
    """
    sizes = [int(STEP_SECONDS * EFFICIENCY * rate / (passes * trial.flops)) for trial in trials]
    for trial, size in zip(trials, sizes):
        if size >= min(batch_size, LEAST_BATCH):
            return trial, min(batch_size, size)
    one = passes * trials[-1].flops / rate
    return None if one > LONGEST else (trials[-1], max(1, sizes[-1]))


@contextmanager
def _seeded() -> Iterator[None]:
    """Torch's randomness from a seed, and afterwards as it was."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _training_rate(config: TrainingSection, facts: Mapping[str, Any], trials: Sequence[Trial], device: str) -> float:
    import torch

    from nfm.trainers import loop
    from nfm.trainers.training.state import Recipe

    def steps(trial: Trial, size: int, deadline: float) -> list[float]:
        ticks: list[float] = []

        def over() -> bool:
            longest = max((after - before for before, after in itertools.pairwise(ticks)), default=0.0)
            return len(ticks) > 1 and time.perf_counter() + longest > deadline

        def tick(_: int) -> None:
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            ticks.append(time.perf_counter())

        with torch.device(device):
            model, loss = trial.make()
        batch = random_batch(size, facts, device)
        # So long a training is all warm-up: its steps hardly move the weights.
        recipe = Recipe(
            10**12, size, config.learning_rate, warmup_examples=10**12, ema=config.ema, emas=config.averages()
        )
        with matrix_products(config.precision):
            loop.train(
                model, loss, itertools.repeat(batch), recipe, device=device, autocast=autocast_dtype(config.precision),
                how=loop.How(microbatch=config.microbatch, recompute=config.recompute), tick=tick, stop=over,
            )  # fmt: skip
        return ticks

    each = _rate(trials, BACKWARD, config.batch_size // config.workers, device, config.precision, steps)
    return each * config.workers


def rate_of_calls(trials: Sequence[Trial], batch_size: int, device: str, precision: Precision) -> float:
    """Examples a second of the first of `trials`, whose `make` gives a function of the size of a batch.

    Others and smaller batches stand for it as in training. The function waits for the end of its work.
    """

    def calls(trial: Trial, size: int, deadline: float) -> list[float]:
        call = trial.make()
        ticks = [time.perf_counter()]
        while len(ticks) < 3 or 2 * ticks[-1] - ticks[-2] < deadline:
            call(size)
            ticks.append(time.perf_counter())
        return ticks

    return _rate(trials, 1, batch_size, device, precision, calls)


def _rate(
    trials: Sequence[Trial], passes: int, batch_size: int, device: str, precision: Precision,
    measure: Callable[[Trial, int, float], Sequence[float]],
) -> float:  # fmt: skip
    """Examples a second of the first of `trials`, each of so many forward passes.

    `measure(trial, size, deadline)` gives the times at which steps ended. Where nothing fits into the time or the
    memory, the rate of matrix products tells it.
    """
    deadline = time.perf_counter() + SECONDS
    products = matrix_rate(device, precision)
    by_products = LARGE * products / (passes * trials[0].flops)
    if (found := fitting(trials, passes, batch_size, products)) is None:
        return by_products
    trial, size = found
    try:
        ticks = measure(trial, size, deadline)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return by_products
    finally:
        free_memory(device)
    return size / _typical(ticks) * trial.flops / trials[0].flops


@functools.cache
def matrix_rate(device: str, precision: Precision, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of products of square matrices in this precision, measured once a process."""
    from nfm.trainers.training import products

    return products.matrix_rate(device, autocast_dtype(precision), precision == "tf32", clock)


def _typical(ticks: Sequence[float]) -> float:
    """Seconds of a step, of the times at which steps ended: the median, without those that warm up where others are."""
    taken = [after - before for before, after in itertools.pairwise(ticks)]
    return statistics.median(taken[2:] or taken[-1:])


def random_batch(size: int, facts: Mapping[str, Any], device: str) -> Batch:
    """A batch of noise of the sizes that `facts` tell of the data."""
    import torch

    shape, classes = tuple(facts["image_shape"]), int(facts.get("classes", 0))
    image, noise = torch.rand(size, *shape, device=device) * 2 - 1, torch.randn(size, *shape, device=device)
    label = torch.randint(max(classes, 1), (size,), device=device) - (0 if classes else 1)
    slot = np.arange(size)
    return Batch(image, noise, label, slot, slot, slot, 0, {}, place=slot)
