"""What the three trained stages share: device and precision, the checkpoint on disk, `metrics.jsonl`, stopping."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from nfm.stages.base import Reporter, Section, StageError, Stopped, Unfit, operational
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.files import atomic
from nfm.storage.files.small_files import MOST_STATE_BYTES, read_bytes
from nfm.storage.reading.reader import check_enough

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nfm.trainers.loop import Loss, Recipe, Trained

Precision = Literal["float32", "bfloat16"]
CHECKPOINT, METRICS, WEIGHTS = "checkpoint.safetensors", "metrics.jsonl", "weights.safetensors"


class TrainingSection(Section):
    """Fields of every section that trains a model; lengths are in examples.

    `precision` is of the matrix products. bfloat16 gains on GPUs and on CPUs with matrix units; on two AVX-512 cores
    without them, training in bfloat16 was half as fast as in float32, hence the default.
    """

    seed: int = Field(0, ge=0)
    batch_size: int = Field(128, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    ema: float = Field(0.999, ge=0, lt=1)
    precision: Precision = "float32"
    device: str = operational("auto")
    save_every: int = operational(20_000, ge=1)
    log_every: int = operational(5_000, ge=1)


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Sizes that do not fit each other, told as an error of what holds them: a config section, an option."""
    try:
        yield
    except WrongArgument as error:  # what else may be passed in Python is no remedy here
        raise Unfit(f"{what}: {error.name} {error.said}") from error
    except ValueError as error:
        raise Unfit(f"{what}: {error}") from error


def pick_device(name: str) -> str:
    """`auto` is CUDA where there is one. Raises Unfit for a device that is none, or is not here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise Unfit(f"device = {name!r}: is none of auto, cpu, cuda and cuda:0, which run here; name one of these")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise Unfit(f"device = {name!r}: torch sees no CUDA device here; set device to 'auto' or 'cpu'")
        if int(name.partition(":")[2] or 0) >= count:
            raise Unfit(f"device = {name!r}: torch sees {count} CUDA devices here, counted from 0; name one of them")
    return name


def check_section(name: str, config: TrainingSection, facts: Mapping[str, Any], sizes: Callable[[], None]) -> None:
    """A stage's `fits`: `sizes` raises ValueError where they do not fit; `facts` are of the data, as far as known."""
    with blaming(f"config section [{name}]"):
        sizes()
        if "images" in facts:
            check_enough(config.batch_size, facts["images"])


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type of the matrix products; affine steps and log-determinants stay in float32 whatever it is."""
    import torch

    return torch.bfloat16 if precision == "bfloat16" else None


def precision_context(device_type: str, precision: Precision) -> Any:
    """Autocast as a stage's precision asks for."""
    import torch

    dtype = autocast_dtype(precision)
    return torch.autocast(device_type, dtype, enabled=dtype is not None)


def recipe(config: TrainingSection, examples: int) -> Recipe:
    """The section's fields as the loop's recipe, for `examples` in all, rounded up to whole batches."""
    from nfm.trainers.loop import Recipe

    total = -(-examples // config.batch_size) * config.batch_size
    return Recipe(
        examples=total,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_examples=int(config.warmup * total),
        weight_decay=config.weight_decay,
        clip=config.clip,
        ema=config.ema,
        seed=config.seed,
    )


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Any,
    config: TrainingSection,
    plan: Recipe,
    out: Path,
    report: Reporter,
    unit: str,
    measure: Callable[[], dict[str, float]] = dict,
) -> Trained:
    """Train with `loop.train` from the checkpoint in `out`, if there is one, to the end or to a stop.

    A line of `metrics.jsonl` has the loop's figures and those of `measure()`, taken every `log_every` examples.
    Raises Stopped after saving when the reporter is stopping; StageError when the training diverges.
    """
    from nfm.trainers import loop
    from nfm.trainers.checkpoint import CheckpointError, unpack

    seen = 0
    saved = read_bytes(out / CHECKPOINT, MOST_STATE_BYTES) if (out / CHECKPOINT).exists() else None
    if saved is not None:
        try:
            seen = unpack(saved)[1]["examples_seen"]
        except CheckpointError as error:
            raise StageError(f"{out / CHECKPOINT}: {error}") from error
        report.say(f"continuing from {seen:,} of {plan.examples:,} {unit}")
        _keep_lines(out / METRICS, unit, seen)
    else:
        (out / METRICS).unlink(missing_ok=True)

    def save(data: bytes) -> None:
        report.check_lock()
        atomic.write_bytes(out / CHECKPOINT, data)

    def log(figures: dict[str, float]) -> None:
        line = {**figures, **measure()}
        with (out / METRICS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({key: round(value, 6) for key, value in line.items()}) + "\n")
        shown.update({key: line[key] for key in ("loss", "heldout_bpd", "accuracy") if key in line})
        shown["wait"] = line["data_wait_share"]
        tick(int(line[f"{unit}_seen"]))

    shown: dict[str, float] = {}  # the figures of the last line

    def tick(done: int) -> None:
        report.progress(done, plan.examples, unit, workers=(), **shown)

    tick(seen)  # from here on a rate is known
    try:
        trained = loop.train(
            model,
            loss,
            batches,
            plan,
            device=pick_device(config.device),
            autocast=autocast_dtype(config.precision),
            unit=unit,
            checkpoint=saved,
            save=save,
            save_every=config.save_every,
            log=log,
            log_every=config.log_every,
            tick=tick,
            stop=lambda: report.stopping,
        )
    except CheckpointError as error:
        raise StageError(f"{out / CHECKPOINT}: {error}") from error
    except FloatingPointError as error:
        raise StageError(f"training diverged: {error}") from error
    if not trained.finished:
        raise Stopped
    return trained


def _keep_lines(path: Path, unit: str, seen: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint: they are written again."""
    lines = read_bytes(path).decode(errors="replace").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)[f"{unit}_seen"] <= seen:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the half line of a killed run
    atomic.write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


def parameter_count(model: nn.Module) -> int:
    """The number of values in a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a finished stage and the arguments that build its model again."""
    from nfm.trainers.checkpoint import CheckpointError, unpack_weights

    try:
        return unpack_weights(read_bytes(folder / WEIGHTS, MOST_STATE_BYTES))
    except CheckpointError as error:
        raise StageError(f"{folder / WEIGHTS}: {error}; `nfm audit {folder}` says what else is wrong") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a training log; lines cut short by a kill are left out."""
    lines = []
    for text in read_bytes(path).decode(errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
