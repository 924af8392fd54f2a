"""What the three trained stages share: device and precision, the checkpoint on disk, `metrics.jsonl`, stopping."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from nfm.stages.base import Inputs, Reporter, Section, StageError, Stopped, Unfit, call, operational
from nfm.stages.trained.devices import launched
from nfm.stages.trained.devices.machine import pick_device
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.files import atomic
from nfm.storage.files.copies.resume import Resume
from nfm.storage.files.small_files import MOST_STATE_BYTES, read_bytes
from nfm.storage.reading.reader import check_enough

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nfm.trainers.loop import Loss
    from nfm.trainers.training.state import Recipe

Precision = Literal["float32", "bfloat16"]
Sharding = Literal["ddp", "fsdp"]
CHECKPOINTS, METRICS, WEIGHTS = "checkpoints", "metrics.jsonl", "weights.safetensors"
OLD_CHECKPOINT = "checkpoint.safetensors"  # where earlier versions kept the state of a training


class TrainingSection(Section):
    """Fields of every section that trains a model; lengths are in examples.

    `precision` is of the matrix products. bfloat16 gains on GPUs and on CPUs with matrix units; on two AVX-512 cores
    without them, training in bfloat16 was half as fast as in float32, hence the default.

    `workers` processes of a Ray cluster share each batch; `sharding` "ddp" keeps the whole model in each, "fsdp" shares
    it out. `microbatch` is the most records that a process computes at a time, `recompute` keeps no activations inside
    layers, `compile` is torch's. None of these changes the result but for rounding.
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
    keep_checkpoints: int = operational(1, ge=1)
    workers: int = operational(1, ge=1)
    sharding: Sharding = operational("ddp")
    microbatch: int | None = operational(None, ge=1)
    recompute: bool = operational(False)
    compile: bool = operational(False)
    ray_address: str | None = operational(None)

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is shared by {self.workers} workers: make it a multiple of them"
            )
        return self


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Sizes that do not fit each other, told as an error of what holds them: a config section, an option."""
    try:
        yield
    except WrongArgument as error:  # what else may be passed in Python is no remedy here
        raise Unfit(f"{what}: {error.name} {error.said}") from error
    except ValueError as error:
        raise Unfit(f"{what}: {error}") from error


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
    from nfm.trainers.training.state import Recipe

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


@dataclass(frozen=True)
class Task:
    """A training as each of its processes makes it, from the config and the inputs alone.

    `measure` gives figures for the log, taken every `log_every` examples by all processes at once. `architecture` is
    what builds the model again; it is stored beside the weights.
    """

    model: nn.Module
    loss: Loss
    batches: Any
    architecture: Mapping[str, Any]
    examples: int
    unit: str
    measure: Callable[[], dict[str, float]] = dict


Make = Callable[[Any, Inputs, str], Task]  # (config, inputs, device): of a module, so that other processes find it


def fit(make: Make, config: TrainingSection, inputs: Inputs, out: Path, report: Reporter) -> None:
    """Train from the checkpoint in `out`, if there is one, to the end, and leave the averaged weights there.

    It happens here, in the processes of a launcher such as torchrun, or in `config.workers` processes of a Ray
    cluster. Raises Stopped after saving when the reporter is stopping; StageError when the training diverges.
    """
    if launched.size() > 1:
        launched.lead(train_here, make, config, inputs, out, report)
    elif config.workers > 1:
        call("nfm.stages.executors.ray_train:fit", make, config, inputs, out, report)
    else:
        train_here(make, config, inputs, out, report, pick_device(config.device))


def train_here(make: Make, config: TrainingSection, inputs: Inputs, out: Path, report: Reporter, device: str) -> None:
    """This process's part of a training, all of it where it is alone. What is written, the first process writes."""
    from nfm.trainers import loop
    from nfm.trainers.checkpoint import CheckpointError, pack_weights
    from nfm.trainers.training import parallel
    from nfm.trainers.training.checkpoint_folder import STATE, CheckpointFolder

    resume = Resume(out, STATE, report.check_lock)
    if parallel.rank() == 0:
        _bring_checkpoint(out, resume)

    def copy(checkpoint: Path) -> None:
        files = {path.name: path for path in checkpoint.iterdir()}
        resume.put(int(checkpoint.name), files | ({METRICS: out / METRICS} if (out / METRICS).exists() else {}))

    task = make(config, inputs, device)
    plan, unit, first = recipe(config, task.examples), task.unit, parallel.rank() == 0
    shown: dict[str, float] = {}  # the figures of the last line

    def log(figures: dict[str, float]) -> None:
        line = {**figures, **task.measure()}
        if first:
            with (out / METRICS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({key: round(value, 6) for key, value in line.items()}) + "\n")
        shown.update({key: line[key] for key in ("loss", "heldout_bpd", "accuracy") if key in line})
        shown["wait"] = line["data_wait_share"]
        tick(int(line[f"{unit}_seen"]))

    def tick(done: int) -> None:
        report.progress(done, plan.examples, unit, workers=(), **shown)

    try:
        with CheckpointFolder(out / CHECKPOINTS, config.keep_checkpoints, report.check_lock, copy) as folder:
            found, old = folder.read(), None
            if found is None and (out / OLD_CHECKPOINT).exists():
                old = read_bytes(out / OLD_CHECKPOINT, MOST_STATE_BYTES)
            seen = found[1]["examples_seen"] if found else seen_of(old) if old else 0
            if first:
                _keep_lines(out / METRICS, unit, seen)
            if seen:
                report.say(f"continuing from {seen:,} of {plan.examples:,} {unit}")
            tick(seen)  # from here on a rate is known
            trained = loop.train(
                task.model,
                task.loss,
                task.batches,
                plan,
                device=device,
                autocast=autocast_dtype(config.precision),
                how=loop.How(config.sharding, config.microbatch, config.compile, config.recompute),
                unit=unit,
                checkpoints=folder,
                old_checkpoint=old,
                save_every=config.save_every,
                log=log,
                log_every=config.log_every,
                tick=tick,
                stop=lambda: report.stopping,
            )
    except CheckpointError as error:
        raise StageError(str(error)) from error
    except FloatingPointError as error:
        raise StageError(f"training diverged: {error}") from error
    if not trained.finished:
        raise Stopped
    weights = {name: parallel.whole(value) for name, value in trained.ema.state_dict().items()}
    if first:
        (out / OLD_CHECKPOINT).unlink(missing_ok=True)
        atomic.write_bytes(out / WEIGHTS, pack_weights(weights, task.architecture))


def seen_of(old_checkpoint: bytes) -> int:
    """How far the training came whose checkpoint this is, in one file."""
    from nfm.trainers.checkpoint import unpack

    return int(unpack(old_checkpoint)[1]["examples_seen"])


def newest_checkpoint(out: Path) -> int:
    """The examples seen of the newest checkpoint, 0 where there is none."""
    from nfm.trainers.training.checkpoint_folder import newest

    found = newest(out / CHECKPOINTS)
    return int(found.name) if found else 0


def _bring_checkpoint(out: Path, resume: Resume) -> None:
    """Brings the newest checkpoint of another machine here, with its log, if it is newer than those that are here."""
    if (seen := resume.newest()) > newest_checkpoint(out):
        folder = out / CHECKPOINTS / f"{seen:012d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        resume.bring(folder)
        if (folder / METRICS).exists():
            (folder / METRICS).replace(out / METRICS)


def kept_files(out: Path) -> list[str]:
    """What a finished training leaves beside its weights."""
    states = [path for path in sorted((out / CHECKPOINTS).rglob("*")) if path.is_file()]
    return [*(str(path.relative_to(out)) for path in states), METRICS]


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
