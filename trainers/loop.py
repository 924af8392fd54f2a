"""The one training loop: any model, loss and batches; exact resume; progress counted in examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nfm.trainers.training import parallel
from nfm.trainers.training.checkpoint_folder import CheckpointFolder
from nfm.trainers.training.ema import EMA, PowerEMA
from nfm.trainers.training.microbatches import parts_of
from nfm.trainers.training.randomness import Randomness, seed_own, step_seed
from nfm.trainers.training.state import Health, Recipe, State

# loss(model, batch, random) -> (scalar to minimise, a mean over the batch; figures whose means go into the log)
Loss = Callable[[Any, Any, Randomness], tuple[Tensor, Mapping[str, float | Tensor]]]

Averages = Mapping[float, nn.Module]  # by relative width


@dataclass(frozen=True)
class How:
    """What of training changes its speed and memory alone.

    sharding: with several processes, "ddp" keeps all of the model in each, "fsdp" shares it out.
    microbatch: the most records of a process that are computed at a time; None: its whole part of a batch.
    compile: torch.compile the model. recompute: keep no activations inside layers, compute them again.
    """

    sharding: parallel.Sharding = "ddp"
    microbatch: int | None = None
    compile: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class Trained:
    """The model and its moving averages, in eval mode on the device, and how far training came.

    `emas` are those of the recipe's `emas`, by relative width.
    """

    model: nn.Module
    ema: nn.Module
    examples_seen: int
    finished: bool
    emas: Averages = field(default_factory=dict)


def learning_rate(recipe: Recipe, examples_seen: int) -> float:
    """The rate of the step that ends at `examples_seen`: linear warm-up, then a cosine to `final_rate`."""
    if examples_seen < recipe.warmup_examples:
        return recipe.learning_rate * examples_seen / recipe.warmup_examples
    decaying = max(recipe.examples - recipe.warmup_examples, 1)
    progress = min((examples_seen - recipe.warmup_examples) / decaying, 1.0)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return recipe.final_rate + (recipe.learning_rate - recipe.final_rate) * cosine


def train(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
    how: How = How(),
    unit: str = "images",
    checkpoints: CheckpointFolder | None = None,
    old_checkpoint: bytes | None = None,
    save_every: int | None = None,
    snapshot: Callable[[int, Averages], None] | None = None,
    snapshot_every: int | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
    log_every: int | None = None,
    show: Callable[[int, nn.Module], None] | None = None,
    show_every: int | None = None,
    tick: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains `model` in place until `recipe.examples` were seen or `stop()` is true.

    Processes that met in torch.distributed train together: each calls this with the same arguments and its own part of
    every batch. Order, noise, times and dropped labels are a record's own, so the result is the same for any number of
    processes and microbatches, up to rounding; models with dropout or batch statistics of their own are the exception.

    Stopped and continued from `checkpoints` equals uninterrupted, bit for bit on a CPU with the same number of threads
    and processes: a step's randomness is seeded from (seed, examples seen); `batches`, if it has `state_dict` and
    `load_state_dict`, goes on where it was (otherwise the caller puts it there).

    batches: endless, on `device`, each of `recipe.batch_size` examples over all processes; `batch.place` says where
        its records stand in the whole batch (without it they follow each other by rank).
    autocast: the dtype of the forward pass, torch.bfloat16 or None for the model's own.
    how: what changes speed and memory only.
    checkpoints, log: written and called whenever the examples seen pass a multiple of `save_every`, `log_every`, and at
        the end; saved also when stopped. A log line has `{unit}_seen`, `{unit}_per_second`, learning_rate,
        data_wait_share (of the time since the line before), seconds (in this call), and means since the line before:
        loss, grad_norm (before clipping) and the loss's own figures. Between lines nothing waits for the device.
    old_checkpoint: a checkpoint in one file, as earlier versions wrote it, to go on from where `checkpoints` has none.
    snapshot: called with the examples seen and the moving averages of `recipe.emas`, whenever a multiple of
        `snapshot_every` was passed, but at the end; by all processes, and before the checkpoint of the same step.
    show: called with the examples seen and the average of `recipe.ema`, whenever a multiple of `show_every` was passed,
        and at the end; by all processes. It changes nothing, and its time is in no rate.
    tick: called with the examples seen after every step that has no log line.
    Raises FloatingPointError when a loss or gradient was not finite: no weights were touched by it or after it.
    CheckpointError for a checkpoint of another model or recipe; ValueError when the batches end too early.
    """
    if autocast is torch.float16:
        raise ValueError("autocast is float16, which needs loss scaling; use torch.bfloat16")
    device = torch.device(device)

    # Network, moving averages, optimizer.
    model = model.to(device).train()
    ema, emas = EMA(model, recipe.ema), [PowerEMA(model, width) for width in recipe.emas]
    averages = {average.width: average.model for average in emas}
    if how.recompute:
        parallel.recompute(model)
    objective = parallel.shared(parallel.Objective(model, loss), how.sharding, device)
    if how.sharding == "fsdp":
        for average in (ema.model, *averages.values()):
            parallel.shard(average, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    if how.compile:
        model.compile()

    # Continue an earlier run.
    state = State(model, ema, emas, optimizer, batches, recipe)
    state.restore(checkpoints, old_checkpoint)
    means, stream, agreement = state.means, iter(batches), parallel.Agreement()

    # Train.
    start = logged = time.perf_counter()
    logged_seen, waited = state.examples_seen, 0.0
    health = Health(optimizer, device)
    finished = state.examples_seen >= recipe.examples
    while not finished and not agreement.reached(stop()):
        seen_before = state.examples_seen
        seed_own(step_seed(recipe.seed, seen_before, f"model{parallel.rank() or ''}"), device)  # for dropout

        waiting = time.perf_counter()
        batch = next(stream, None)
        waited += time.perf_counter() - waiting
        if batch is None:
            raise ValueError(f"the batches ended after {seen_before} of {recipe.examples} {unit}; give endless ones")

        # Gradient: of the mean over the whole batch, one microbatch after another.
        optimizer.zero_grad(set_to_none=True)
        step_figures: dict[str, Any] = {"loss": 0.0}
        for part, places, share, last in parts_of(batch, how.microbatch, device):
            random = Randomness(step_seed(recipe.seed, seen_before, "loss"), recipe.batch_size, places, device)
            with parallel.part_of_step(objective, last):
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    value, figures = objective(part, random)
                # A loss that is not finite makes every gradient so, in every process.
                value.backward(torch.full_like(value, share) + 0 * value.detach())
            for name, figure in {"loss": value.detach(), **figures}.items():
                step_figures[name] = step_figures.get(name, 0.0) + share * figure
        norm = parallel.whole(nn.utils.clip_grad_norm_(parameters, recipe.clip))
        health.note(seen_before, step_figures["loss"], norm)

        # Weights.
        state.examples_seen = seen_before + recipe.batch_size
        rate = learning_rate(recipe, state.examples_seen)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        ema.update(model)
        for power in emas:
            power.update(model, state.examples_seen, recipe.batch_size)
        means.add({**step_figures, "grad_norm": norm})
        finished = state.examples_seen >= recipe.examples

        # Report.
        if log is not None and (finished or _passed(log_every, seen_before, state.examples_seen)):
            health.check(recipe, unit)
            now = time.perf_counter()
            log(
                {
                    f"{unit}_seen": state.examples_seen,
                    **means.take(),
                    "learning_rate": rate,
                    f"{unit}_per_second": (state.examples_seen - logged_seen) / (now - logged),
                    "data_wait_share": waited / (now - logged),
                    "seconds": now - start,
                }
            )
            logged, logged_seen, waited = now, state.examples_seen, 0.0
        elif tick is not None:
            tick(state.examples_seen)
        if show is not None and (finished or _passed(show_every, seen_before, state.examples_seen)):
            health.check(recipe, unit)
            paused = time.perf_counter()
            show(state.examples_seen, ema.model)
            logged += time.perf_counter() - paused

        # Save.
        if snapshot is not None and not finished and _passed(snapshot_every, seen_before, state.examples_seen):
            health.check(recipe, unit)
            snapshot(state.examples_seen, averages)
        if checkpoints is not None and not finished and _passed(save_every, seen_before, state.examples_seen):
            health.check(recipe, unit)
            state.save(checkpoints)

    agreement.end()
    health.check(recipe, unit)
    if checkpoints is not None:
        state.save(checkpoints)
        checkpoints.wait()
    del objective
    parallel.release()
    return Trained(model.eval(), ema.model, state.examples_seen, finished, averages)


def _passed(every: int | None, before: int, after: int) -> bool:
    """Whether the count passed a multiple of `every`."""
    return every is not None and before // every != after // every
