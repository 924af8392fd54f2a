"""The one training loop: any model, loss and batches; exact resume; progress counted in examples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfm.trainers import checkpoint as checkpoints
from nfm.trainers.ema import EMA
from nfm.trainers.randomness import Randomness, step_seed

# loss(model, batch, random) -> (scalar to minimise, a mean over the batch; figures whose means go into the log)
Loss = Callable[[Any, Any, Randomness], tuple[Tensor, Mapping[str, float | Tensor]]]


@dataclass(frozen=True)
class Recipe:
    """What of training changes its result; lengths are in examples, `batch_size` is what each batch holds."""

    examples: int
    batch_size: int
    learning_rate: float
    warmup_examples: int = 0
    final_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4  # on every parameter
    clip: float = 1.0  # of the gradient's global norm; math.inf leaves it as it is
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.warmup_examples <= self.examples:
            raise ValueError(f"recipe.warmup_examples is {self.warmup_examples}; not in 0..{self.examples} (examples)")


@dataclass(frozen=True)
class Trained:
    """The model and its moving average, both in eval mode on the device, and how far training came."""

    model: nn.Module
    ema: nn.Module
    examples_seen: int
    finished: bool


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
    unit: str = "images",
    checkpoint: bytes | None = None,
    save: Callable[[bytes], None] | None = None,
    save_every: int | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
    log_every: int | None = None,
    tick: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains `model` in place until `recipe.examples` were seen or `stop()` is true.

    Stopped and continued from the last `checkpoint` equals uninterrupted, bit for bit on a CPU with the same
    number of threads: a step's `Randomness` and torch's global randomness are seeded anew at each step from (seed,
    examples seen); `batches`, if it has `state_dict` and `load_state_dict`, goes on where it was (otherwise
    the caller puts it there).

    batches: endless, on `device`, each of `recipe.batch_size` examples.
    autocast: the dtype of the forward pass, torch.bfloat16 or None for the model's own.
    save, log: called whenever the examples seen pass a multiple of `save_every`, `log_every`, and at the end;
        save also when stopped. A log line has `{unit}_seen`, `{unit}_per_second`, learning_rate,
        data_wait_share (of the time since the line before), seconds (in this call), and means since the line
        before: loss, grad_norm (before clipping) and the loss's own figures.
    tick: called with the examples seen after every step that has no log line.
    Raises FloatingPointError when the loss or gradient is not finite, before the weights are touched by it;
    CheckpointError for a checkpoint of another model or recipe; ValueError when the batches end too early.
    """
    if autocast is torch.float16:
        raise ValueError("autocast is float16, which needs loss scaling; use torch.bfloat16")
    device = torch.device(device)

    # Network, optimizer, moving average.
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    ema = EMA(model, recipe.ema)
    examples_seen = 0
    means = Means()

    # Continue an earlier run.
    if checkpoint is not None:
        examples_seen, means = _restore(checkpoint, model, ema, optimizer, batches, recipe)
    stream = iter(batches)

    # Train.
    start = logged = time.perf_counter()
    logged_seen, waited = examples_seen, 0.0
    finished = examples_seen >= recipe.examples
    while not finished and not stop():
        seen_before, examples_seen = examples_seen, examples_seen + recipe.batch_size
        random = Randomness(step_seed(recipe.seed, seen_before, "loss"), recipe.batch_size, device=device)
        torch.manual_seed(step_seed(recipe.seed, seen_before, "model"))  # for models with dropout

        waiting = time.perf_counter()
        batch = next(stream, None)
        waited += time.perf_counter() - waiting
        if batch is None:
            raise ValueError(f"the batches ended after {seen_before} of {recipe.examples} {unit}; give endless ones")

        # Gradient.
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            value, figures = loss(model, batch, random)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        step_loss, grad_norm = torch.stack([value.detach().float(), norm.float()]).tolist()  # one wait
        if not math.isfinite(step_loss) or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"loss {step_loss}, gradient norm {grad_norm} in the step after {seen_before} {unit}: "
                f"lower learning_rate (now {recipe.learning_rate}), lengthen the warm-up or train without "
                "autocast; the latest checkpoint is from before this"
            )

        # Weights.
        rate = learning_rate(recipe, examples_seen)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        ema.update(model)
        means.add({"loss": step_loss, "grad_norm": grad_norm, **figures})
        finished = examples_seen >= recipe.examples

        # Report.
        if log is not None and (finished or _passed(log_every, seen_before, examples_seen)):
            now = time.perf_counter()
            log(
                {
                    f"{unit}_seen": examples_seen,
                    **means.take(),
                    "learning_rate": rate,
                    f"{unit}_per_second": (examples_seen - logged_seen) / (now - logged),
                    "data_wait_share": waited / (now - logged),
                    "seconds": now - start,
                }
            )
            logged, logged_seen, waited = now, examples_seen, 0.0
        elif tick is not None:
            tick(examples_seen)

        # Save.
        if save is not None and not finished and _passed(save_every, seen_before, examples_seen):
            save(_state(model, ema, optimizer, batches, recipe, examples_seen, means))

    if save is not None:
        save(_state(model, ema, optimizer, batches, recipe, examples_seen, means))
    return Trained(model.eval(), ema.model, examples_seen, finished)


class Means:
    """Running means of named figures since they were last taken."""

    def __init__(self, sums: Mapping[str, float] | None = None, steps: int = 0) -> None:
        self.sums = dict(sums or {})
        self.steps = steps

    def add(self, figures: Mapping[str, float | Tensor]) -> None:
        for name, figure in figures.items():
            value = figure.detach() if isinstance(figure, Tensor) else figure
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.steps += 1

    def take(self) -> dict[str, float]:
        means = {name: total / self.steps for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


def _state(
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    recipe: Recipe,
    examples_seen: int,
    means: Means,
) -> bytes:
    tensors = {
        **checkpoints.with_prefix("model", model.state_dict()),
        **checkpoints.with_prefix("ema", ema.model.state_dict()),
        **checkpoints.with_prefix("optimizer", checkpoints.optimizer_tensors(model, optimizer)),
    }
    meta = {
        "recipe": asdict(recipe),
        "examples_seen": examples_seen,
        "ema_updates": ema.updates,
        "log": {"sums": means.sums, "steps": means.steps},
        "batches": batches.state_dict() if hasattr(batches, "state_dict") else None,
    }
    return checkpoints.pack(tensors, meta)


def _restore(
    data: bytes, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, batches: Any, recipe: Recipe
) -> tuple[int, Means]:
    tensors, meta = checkpoints.unpack(data)
    for name, value in asdict(recipe).items():
        saved = meta.get("recipe", {}).get(name)
        if saved != (list(value) if isinstance(value, tuple) else value):
            raise checkpoints.CheckpointError(
                f"the checkpoint was trained with recipe.{name} = {saved}, not {value}; "
                "give the same recipe or train from the start"
            )
    try:
        model.load_state_dict(checkpoints.under_prefix("model", tensors))
        ema.model.load_state_dict(checkpoints.under_prefix("ema", tensors))
    except RuntimeError as error:
        raise checkpoints.CheckpointError(f"a checkpoint of another model: {error}") from error
    checkpoints.load_optimizer_tensors(model, optimizer, checkpoints.under_prefix("optimizer", tensors))
    ema.updates = meta["ema_updates"]
    if meta["batches"] is not None and hasattr(batches, "load_state_dict"):
        batches.load_state_dict(meta["batches"])
    return meta["examples_seen"], Means(**meta["log"])


def _passed(every: int | None, before: int, after: int) -> bool:
    """Whether the count passed a multiple of `every`."""
    return every is not None and before // every != after // every
