"""All that a training is between two steps: what a checkpoint holds, and what is known of the steps so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from nfm.trainers import checkpoint as one_file
from nfm.trainers.training import parallel
from nfm.trainers.training.checkpoint_folder import CheckpointFolder, load_tensors
from nfm.trainers.training.ema import EMA, PowerEMA


@dataclass(frozen=True)
class Recipe:
    """What of training changes its result; lengths are in examples, `batch_size` is what each batch holds.

    `ema` is the decay of the moving average that is the finished model, `emas` are relative widths of further ones.
    """

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
    emas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.warmup_examples <= self.examples:
            raise ValueError(f"recipe.warmup_examples is {self.warmup_examples}; not in 0..{self.examples} (examples)")


class State:
    """All that a training is: what a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        ema: EMA,
        emas: Sequence[PowerEMA],
        optimizer: torch.optim.Optimizer,
        batches: Any,
        recipe: Recipe,
    ) -> None:
        self.model, self.ema, self.emas, self.optimizer = model, ema, emas, optimizer
        self.batches, self.recipe = batches, recipe
        self.examples_seen = 0
        self.means = Means()
        for parameter in model.parameters():  # as the fused optimizer makes them in its first step
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def save(self, checkpoints: CheckpointFolder) -> None:
        checkpoints.save(self._tensors(), self._meta(), self.examples_seen)

    def restore(self, checkpoints: CheckpointFolder | None, old: bytes | None) -> None:
        found = checkpoints.read() if checkpoints is not None else None
        if found is not None:
            newest, meta = found
            self._check_recipe(meta)
            load_tensors(newest, self._tensors())
        elif old is not None:
            tensors, meta = one_file.unpack(old)
            self._check_recipe(meta)
            self._take_over(tensors)
        else:
            return
        self.ema.updates = meta["ema_updates"]
        if meta["batches"] is not None and hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(meta["batches"])
        self.examples_seen, self.means = meta["examples_seen"], Means(**meta["log"])

    def _tensors(self) -> one_file.Tensors:
        """The tensors themselves, by name: a checkpoint is read into them."""
        averages = {"ema": self.ema.model, **{f"ema-{ema.width}": ema.model for ema in self.emas}}
        named = [one_file.with_prefix(name, average.state_dict()) for name, average in averages.items()]
        return {
            **one_file.with_prefix("model", self.model.state_dict()),
            **{name: tensor for tensors in named for name, tensor in tensors.items()},
            **one_file.with_prefix("optimizer", one_file.optimizer_tensors(self.model, self.optimizer)),
        }

    def _meta(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.recipe),
            "examples_seen": self.examples_seen,
            "ema_updates": self.ema.updates,
            "log": {"sums": self.means.read(), "steps": self.means.steps},
            "batches": self.batches.state_dict() if hasattr(self.batches, "state_dict") else None,
        }

    def _check_recipe(self, meta: Mapping[str, Any]) -> None:
        defaults = {field.name: field.default for field in fields(self.recipe)}  # what an older checkpoint had
        for name, value in asdict(self.recipe).items():
            saved = meta.get("recipe", {}).get(name, defaults[name])
            if saved not in (value, list(value) if isinstance(value, tuple) else value):
                raise one_file.CheckpointError(
                    f"the checkpoint was trained with recipe.{name} = {saved}, not {value}; "
                    "give the same recipe or train from the start"
                )

    def _take_over(self, tensors: one_file.Tensors) -> None:
        """The state of a checkpoint in one file, as earlier versions wrote it."""
        own = self._tensors()
        other = sorted(set(own) ^ set(tensors)) or [name for name in own if own[name].shape != tensors[name].shape]
        if other:
            raise one_file.CheckpointError(f"a checkpoint of another model: it differs in {other[0]!r}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                parallel.fill(own[name], tensor)


class Means:
    """Running means of named figures since they were last taken, summed on the figures' device."""

    def __init__(self, sums: Mapping[str, float] | None = None, steps: int = 0) -> None:
        self.sums: dict[str, Any] = dict(sums or {})
        self.steps = steps

    def add(self, figures: Mapping[str, float | Tensor]) -> None:
        for name, figure in figures.items():
            value = figure.detach().double() if isinstance(figure, Tensor) else figure
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The sums, as means over all processes. This waits for the device."""
        if not self.sums:
            return {}
        device = next((found.device for found in self.sums.values() if isinstance(found, Tensor)), None)
        values = [torch.as_tensor(found, dtype=torch.float64, device=device) for found in self.sums.values()]
        self.sums = dict(zip(self.sums, parallel.mean(torch.stack(values)).tolist(), strict=True))
        return dict(self.sums)

    def take(self) -> dict[str, float]:
        means = {name: total / self.steps for name, total in self.read().items()}
        self.sums, self.steps = {}, 0
        return means


class Health:
    """Whether every loss and gradient was finite, kept on the device: from the first that was not, no step is taken."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._last = torch.zeros(3, device=device, dtype=torch.float64)  # examples seen before it, loss, norm

    def note(self, seen_before: int, loss: Tensor, norm: Tensor) -> None:
        """Before a step is taken: its loss and gradient norm."""
        now = torch.stack([torch.full_like(loss, seen_before, dtype=torch.float64), loss.double(), norm.double()])
        self._last = torch.where(self._last.isfinite().all(), now, self._last)
        # The fused optimizer skips a step where this is 1; a gradient scaler tells it in the same way.
        self._optimizer.found_inf = 1.0 - self._last.isfinite().all().float()  # type: ignore[attr-defined]

    def check(self, recipe: Recipe, unit: str) -> None:
        """Raises FloatingPointError where a step was not taken. This waits for the device."""
        seen_before, loss, norm = self._last.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            remedy = (
                f"lower learning_rate (now {recipe.learning_rate}), lengthen the warm-up or train without autocast; "
                "the latest checkpoint is from before this"
            )
            if not seen_before:
                remedy = (
                    "no weight had changed, so the model, the loss or the data gives it, whatever the learning rate: "
                    "look for a division by 0, and for a log or a root of 0"
                )
            raise FloatingPointError(
                f"loss {loss}, gradient norm {norm} in the step after {int(seen_before)} {unit}: {remedy}"
            )
