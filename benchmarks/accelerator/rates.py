"""How fast a device encodes, trains and samples, and its shares of the rate of bfloat16 matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.accelerator.job import Job
from benchmarks.accelerator.sizes import BACKWARD, ETA, Plan, random_images
from benchmarks.turns import Turns
from nfm.trainers import flow_matching, likelihood, loop, solvers
from nfm.trainers.couplings.coupling import NFM
from nfm.trainers.training.products import matrix_rate

if TYPE_CHECKING:
    from torch import nn

    from nfm.trainers.training.randomness import Randomness

ROUNDS = 5
NFE = 31  # Heun, the paper's best column; the teacher has one way to sample
HUGE = 10**12  # examples of a schedule that never ends


def matrices(job: Job) -> dict[str, Any]:
    """The card's own rates, of square matrices."""
    device = job.device
    kinds: dict[str, dict[str, Any]] = {"float32": {}, "tf32": {"tf32": True}, "bfloat16": {"dtype": torch.bfloat16}}
    if not device.startswith("cuda"):
        del kinds["tf32"]
    return {f"{name}_tflops": short(matrix_rate(device, **how) / 1e12) for name, how in kinds.items()}


def encode(job: Job) -> dict[str, Any]:
    """Images a second of the teacher's encoding."""
    plan, device = job.plan, job.device
    sizes, found = plan.paper, dict[str, Any]()
    images, labels = random_images(sizes, sizes.encode_batch, device)
    eps = torch.randn_like(images)
    for name, dtype, compiled in _ways(device):
        flow = sizes.flow().to(device)
        if compiled:
            flow.compile(dynamic=False)
        coupling = NFM(flow, ETA, 1.0, device, dtype)
        found[name] = _measured(
            lambda coupling=coupling: coupling(images, labels, eps), len(images), sizes.teacher_flops(), plan, device
        )
    return found


def train(job: Job) -> dict[str, Any]:
    """Images a second of whole training steps, in our loop: gradient, clipping, AdamW, moving average."""
    plan, device = job.plan, job.device
    sizes, found = plan.paper, dict[str, Any]()
    for name, dtype, compiled in _ways(device):
        for what, make, loss, batch, flops in (
            ("teacher", sizes.flow, teacher_loss, sizes.train_batch, sizes.teacher_flops()),
            ("student", sizes.network, student_loss, sizes.student_batch, sizes.student_flops()),
        ):
            images, labels = random_images(sizes, batch, device)
            given = SimpleNamespace(image=images, noise=torch.randn_like(images), label=labels)
            rates = steps_of(make(), loss, given, batch, device, dtype, compiled, plan.seconds)
            found[f"{what}, {name}"] = _row(median(rates), BACKWARD * flops, device) | {"batch": batch}
    return found


def sample(job: Job) -> dict[str, Any]:
    """Images a second of samples, the student's by Heun and the teacher's token by token, and the ratio of the two.

    The paper says 32 at these sizes.
    """
    plan, device = job.plan, job.device
    sizes, found = plan.paper, dict[str, Any]()
    noise, labels = random_images(sizes, sizes.sample_batch, device)
    network, flow = sizes.network().eval().to(device), sizes.flow().eval().to(device)
    velocity = flow_matching.velocity(network, labels)
    with torch.autocast(device.partition(":")[0], torch.bfloat16):
        found["student"] = _measured(
            lambda: solvers.sample(velocity, noise, NFE, "heun"), len(noise), NFE * sizes.student_flops(), plan, device
        ) | {"nfe": NFE}
        found["teacher"] = _measured(
            lambda: flow.decode(noise, labels), len(noise), sizes.teacher_flops(), plan, device, rounds=1
        )
    ratio = found["student"]["images_per_second"] / found["teacher"]["images_per_second"]
    return found | {"student_over_teacher": short(ratio), "the_paper_says": 32}


def teacher_loss(model: Any, batch: Any, random: Randomness) -> tuple[torch.Tensor, dict[str, float]]:
    return likelihood.loss(model, batch.image, batch.label, random, ETA), {}


def student_loss(model: Any, batch: Any, random: Randomness) -> tuple[torch.Tensor, dict[str, float]]:
    return flow_matching.loss(model, batch.image, batch.noise, batch.label, random), {}


def _ways(device: str) -> list[tuple[str, torch.dtype | None, bool]]:
    """Name, type of the products, whether the layers are compiled: on a CPU only what takes no compiler."""
    ways: list[tuple[str, torch.dtype | None, bool]] = [("float32", None, False), ("bfloat16", torch.bfloat16, False)]
    return ways + ([("bfloat16, compiled", torch.bfloat16, True)] if device.startswith("cuda") else [])


def steps_of(
    model: nn.Module, loss: loop.Loss, batch: Any, size: int, device: str, dtype: torch.dtype | None, compiled: bool,
    seconds: float,
) -> list[float]:  # fmt: skip
    """Images a second of our loop on one batch, a figure for each of some rounds."""
    turns = Turns([batch], None, ROUNDS, seconds / ROUNDS, time.perf_counter)
    recipe = loop.Recipe(HUGE, size, 1e-4, warmup_examples=HUGE)  # its steps hardly move the weights
    loop.train(
        model, loss, turns, recipe, device=device, autocast=dtype, how=loop.How(compile=compiled),
        stop=lambda: turns.over,
    )  # fmt: skip
    return turns.ours


def _measured(
    work: Callable[[], object], count: int, flops: float, plan: Plan, device: str, rounds: int = ROUNDS
) -> dict[str, Any]:
    """A row for a work that makes `count` images; the first call, which compiles and warms up, does not count."""
    work()
    rates: list[float] = []
    for _ in range(rounds):
        _wait(device)
        began, done = time.perf_counter(), 0
        while not done or time.perf_counter() - began < plan.seconds / rounds:
            work()
            _wait(device)
            done += count
        rates.append(done / (time.perf_counter() - began))
    return _row(median(rates), flops, device) | {"batch": count}


def _row(rate: float, flops: float, device: str) -> dict[str, Any]:
    share = rate * flops / matrix_rate_of(device)
    return {"images_per_second": short(rate), "tflops": short(rate * flops / 1e12), "of_bf16_rate": short(share)}


_RATES: dict[str, float] = {}


def matrix_rate_of(device: str) -> float:
    """Of bfloat16, measured once a process."""
    if device not in _RATES:
        _RATES[device] = matrix_rate(device, torch.bfloat16)
    return _RATES[device]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def short(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")
