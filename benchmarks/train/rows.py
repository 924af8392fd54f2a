"""The steps of two trainings in turns, in one process, on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.train.cases import Case
from benchmarks.turns import Peer, Turns
from nfm.stages.trained.costs import Trial
from nfm.stages.trained.devices.precision import autocast_dtype
from nfm.stages.trained.devices.timing import BACKWARD, matrix_rate, random_batch
from nfm.stages.trained.training import parameter_count
from nfm.stages.trained.training.section import recipe
from nfm.storage.reading.batch import Batch
from nfm.trainers import loop
from nfm.trainers.training.state import Recipe

BATCHES = 4  # that come round and round
SAME = 1e-4  # relative, of two losses in float32


def measure(
    case: Case, peer: Callable[[], Peer] | None, rounds: int, seconds: float, device: str, compiled: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:  # fmt: skip
    """A case's row: images a second of both, the ratio, and the share of the matrix rate.

    A round is steps of theirs for about `seconds`, then the same number of ours; the ratio is the median over rounds.
    Our loop runs all the while and takes its batches from here, so that its steps are those of a long training.
    """
    torch.manual_seed(0)
    config = case.config
    batches = [random_batch(config.batch_size, case.facts, device) for _ in range(BATCHES)]
    theirs = peer() if peer else None
    same = check_same(case, theirs, batches[0]) if theirs else {}
    products = [matrix_rate(device, config.precision, clock)]
    turns = Turns(batches, theirs, rounds, seconds, clock)
    with torch.device(device):
        model, loss = case.trial.make()
    loop.train(
        model, loss, turns, _recipe(case), device=device, autocast=autocast_dtype(config.precision),
        how=loop.How(compile=compiled), log=lambda line: None, log_every=config.log_every, stop=lambda: turns.over,
    )  # fmt: skip
    products.append(matrix_rate.__wrapped__(device, config.precision, clock))
    found: dict[str, Any] = {
        "parameters": parameter_count(model),
        "gflop_per_image": round(BACKWARD * case.trial.flops / 1e9, 4), "steps_a_round": turns.steps,
        "matrix_gflops": round(max(products) / 1e9, 1), "ours": _rates(turns.ours, case.trial, max(products)),
    }  # fmt: skip
    if theirs is None:
        return {**found, "theirs": "not given"}
    ratios = [a / b for a, b in zip(turns.ours, turns.theirs)]
    return {
        **found, "theirs": _rates(turns.theirs, case.trial, max(products)),
        "ours_over_theirs": round(median(ratios), 3), "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3), **same,
    }  # fmt: skip


def check_same(case: Case, theirs: Peer, batch: Batch) -> dict[str, Any]:
    """Both losses from the same weights. Raises ValueError where they, or the numbers of weights, differ."""
    with torch.device("meta"):
        model, _ = case.trial.make()
    counts = [sum(p.numel() for p in of.parameters() if p.requires_grad) for of in (theirs.model, model)]
    if counts[0] != counts[1]:
        raise ValueError(f"{case.name}: theirs has {counts[0]} weights, ours {counts[1]}: not the same model")
    image, label = batch.image[:2], batch.label[:2].clone()
    label[0] = -1
    with torch.no_grad():
        losses = theirs.losses(image, label)
    if not abs(losses[0] - losses[1]) <= SAME * abs(losses[0]):
        raise ValueError(f"{case.name}: from the same weights theirs has loss {losses[0]}, ours {losses[1]}")
    return {"loss_of_theirs": losses[0], "loss_of_ours": losses[1], "stand_ins": theirs.stand_ins}


def _recipe(case: Case) -> Recipe:
    """The section's recipe, so long that all of it is warm-up: its steps hardly move the weights."""
    size = case.config.batch_size
    return recipe(case.config.model_copy(update={"warmup": 1.0}), size * 10**9)


def _rates(rates: list[float], trial: Trial, products: float) -> dict[str, float]:
    rate = median(rates)
    return {
        "images_per_second": float(f"{rate:.4g}"),
        "of_matrix_rate": round(BACKWARD * trial.flops * rate / products, 3),
    }
