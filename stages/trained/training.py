"""What the three trained stages share: device and precision, the checkpoint on disk, stopping."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from nfm.stages.base import Inputs, Reporter, Section, StageError, Stopped, Unfit, call, operational
from nfm.stages.display.watching.grids import draw_grid, grids_of, noises, path_of
from nfm.stages.display.watching.lines import METRICS, Lines, Watching
from nfm.stages.trained.devices import launched
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.weights import SNAPSHOTS, WEIGHTS, file_of, files_of
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.files import atomic
from nfm.storage.files.copies.resume import Resume, newest
from nfm.storage.files.paths import is_remote, names_in, temporary_name
from nfm.storage.files.small_files import MOST_STATE_BYTES, read_bytes
from nfm.storage.reading.reader import check_enough, check_shared

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nfm.trainers.loop import Averages, Loss
    from nfm.trainers.training.state import Recipe

Precision = Literal["float32", "tf32", "bfloat16"]
Sharding = Literal["ddp", "fsdp"]
CHECKPOINTS = "checkpoints"
DISTANCE = "samples_sliced_w2"  # of samples while training, in the log
OLD_CHECKPOINT = "checkpoint.safetensors"  # where earlier versions kept the state of a training


class TrainingSection(Section):
    """Fields of every section that trains a model; lengths are in examples.

    `precision` is of the matrix products; "tf32" is float32 whose products round to 10 bits, on CUDA devices. bfloat16
    gains on GPUs and on CPUs with matrix units; on two AVX-512 cores without them, training in bfloat16 was half as
    fast as in float32, hence the default.

    `workers` processes of a Ray cluster share each batch; `sharding` "ddp" keeps the whole model in each, "fsdp" shares
    it out. `microbatch` is the most records that a process computes at a time, `recompute` keeps no activations inside
    layers, `compile` is torch's. None of these changes the result but for rounding.

    `watch` names who is told of the training beside `metrics.jsonl`, see stages/display/watching/.
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
    watch: tuple[Watching, ...] = operational(())

    @property
    def processes(self) -> int:
        """How many train: those of a launcher, else the workers."""
        return launched.size() if launched.size() > 1 else self.workers

    def averages(self) -> tuple[float, ...]:
        """The relative widths of the moving averages that are kept beside that of `ema`."""
        return ()


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
        check_shared(config.batch_size, config.processes)
        if "images" in facts:
            check_enough(config.batch_size, facts["images"])


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type of the matrix products; affine steps and log-determinants stay in float32 whatever it is."""
    import torch

    return torch.bfloat16 if precision == "bfloat16" else None


def check_precision(device: str, precision: Precision, field: str = "precision") -> None:
    """Raises Unfit where a device does not compute in this precision."""
    import torch

    if precision != "tf32":
        return
    if not device.startswith("cuda"):
        raise Unfit(f'{field} = "tf32" is of CUDA devices, and the device is {device}: use "float32"')
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise Unfit(f'{field} = "tf32": {torch.cuda.get_device_name(device)} has no TF32; use "float32"')


def matrix_products(precision: Precision) -> AbstractContextManager[None]:
    """Products of float32 in TF32 where the precision says so; else in float32, also where torch would not."""
    from nfm.trainers.training.products import products

    return products(tf32=precision == "tf32")


@contextmanager
def precision_context(device_type: str, precision: Precision) -> Iterator[None]:
    """Autocast and matrix products as a stage's precision asks for."""
    import torch

    dtype = autocast_dtype(precision)
    with matrix_products(precision), torch.autocast(device_type, dtype, enabled=dtype is not None):
        yield


def whole_batches(config: TrainingSection, examples: int) -> int:
    """So many examples, rounded up to whole batches."""
    return -(-examples // config.batch_size) * config.batch_size


def recipe(config: TrainingSection, examples: int) -> Recipe:
    """The section's fields as the loop's recipe, for `examples` in all, rounded up to whole batches."""
    from nfm.trainers.training.state import Recipe

    total = whole_batches(config, examples)
    return Recipe(
        examples=total,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_examples=int(config.warmup * total),
        weight_decay=config.weight_decay,
        clip=config.clip,
        ema=config.ema,
        seed=config.seed,
        emas=config.averages(),
    )


@dataclass(frozen=True)
class Samples:
    """Grids of `count` images that a training draws after each `every` examples, and at its end.

    `decode` makes images of a model, noises and labels; `image_dtype` is that of the data. If there are `real` images
    [N, C, H, W], float32 with their labels [N], as many samples are made, and their distance to them is logged.
    """

    every: int
    count: int
    decode: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    image_dtype: str
    real: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Task:
    """A training as each of its processes makes it, from the config and the inputs alone.

    `measure` gives figures for the log, taken every `log_every` examples by all processes at once. `architecture` is
    what builds the model again; it is stored beside the weights. After every `snapshots` examples the moving averages
    of the config's `averages` are kept. `samples` says what grids are drawn.
    """

    model: nn.Module
    loss: Loss
    batches: Any
    architecture: Mapping[str, Any]
    examples: int
    unit: str
    measure: Callable[[], dict[str, float]] = dict
    snapshots: int | None = None
    samples: Samples | None = None


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
    from nfm.trainers.training.checkpoint_folder import CheckpointFolder
    from nfm.trainers.training.ema import shadow_of

    check_precision(device, config.precision)
    resume = Resume(out, report.check_lock)
    if parallel.rank() == 0:
        _bring_checkpoint(out, resume)

    task = make(config, inputs, device)
    plan, unit, first = recipe(config, task.examples), task.unit, parallel.rank() == 0
    shown: dict[str, float] = {}  # the figures of the last line
    lines: Lines | None = None
    plain = shadow_of(task.model) if task.samples is not None and config.sharding == "fsdp" else None

    def log(figures: dict[str, float]) -> None:
        line = {**figures, **task.measure()}
        if lines is not None:
            lines.add(line)
        shown.update({key: line[key] for key in ("loss", "heldout_bpd", "accuracy") if key in line})
        shown["wait"] = line["data_wait_share"]
        tick(int(line[f"{unit}_seen"]))

    def write(path: Path, model: nn.Module) -> None:
        weights = {name: parallel.whole(value) for name, value in model.state_dict().items()}
        if first:
            report.check_lock()
            atomic.write_bytes(path, pack_weights(weights, task.architecture))

    def snapshot(seen: int, averages: Averages) -> None:
        if first:
            (out / SNAPSHOTS).mkdir(exist_ok=True)
        for width, average in averages.items():
            write(out / file_of(width, seen), average)

    def show(seen: int, average: nn.Module) -> None:
        if plain is not None:  # all processes put the average together, and the first one draws
            weights = {name: parallel.whole(value) for name, value in average.state_dict().items()}
            if first:
                plain.load_state_dict(weights)
        if lines is not None and task.samples is not None:
            report.check_lock()
            model = average if plain is None else plain.to(device)
            _draw(path_of(out, seen), model, task, config, device)
            lines.picture(seen, path_of(out, seen))
            if task.samples.real is not None:
                distance = _distance(model, task.samples, config, device)
                if distance is not None:
                    lines.add({f"{unit}_seen": seen, DISTANCE: distance})

    def tick(done: int) -> None:
        report.progress(done, plan.examples, unit, workers=(), **shown)

    try:
        with ExitStack() as kept:
            folder = kept.enter_context(
                CheckpointFolder(
                    out / CHECKPOINTS,
                    config.keep_checkpoints,
                    report.check_lock,
                    partial(_put_checkpoint, out, resume),
                    own=resume.elsewhere,
                )
            )
            kept.enter_context(matrix_products(config.precision))
            found, old = folder.read(), None
            if found is None and (out / OLD_CHECKPOINT).exists():
                old = read_bytes(out / OLD_CHECKPOINT, MOST_STATE_BYTES)
            seen = found[1]["examples_seen"] if found else seen_of(old) if old else 0
            if first:
                told = config.model_dump(mode="json")
                lines = kept.enter_context(Lines(out, unit, seen, config.watch, told, report.say))
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
                snapshot=snapshot,
                snapshot_every=task.snapshots,
                show=None if task.samples is None else show,
                show_every=None if task.samples is None else task.samples.every,
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
    if first:
        (out / OLD_CHECKPOINT).unlink(missing_ok=True)
    for width, average in trained.emas.items():
        write(out / file_of(width), average)
    write(out / WEIGHTS, trained.ema)


def _draw(path: Path, model: nn.Module, task: Task, config: TrainingSection, device: str) -> None:
    """A grid of the task's samples, by this model."""
    import torch

    samples, built = task.samples, task.architecture
    assert samples is not None
    path.parent.mkdir(exist_ok=True)
    with precision_context(torch.device(device).type, config.precision):
        draw_grid(
            path, partial(samples.decode, model), built["image_shape"], built["classes"], samples.count, config.seed,
            device, samples.image_dtype,
        )  # fmt: skip


def _distance(model: nn.Module, samples: Samples, config: TrainingSection, device: str) -> float | None:
    """The sliced Wasserstein distance of samples to the real images, with their labels, from the same noises always.

    None where samples are not finite: the loss tells that.
    """
    import torch

    from nfm.trainers.metrics.wasserstein import sliced_wasserstein

    assert samples.real is not None
    real, labels = samples.real
    noise, made = torch.from_numpy(noises(config.seed, len(real), real.shape[1:])), []
    with torch.no_grad(), precision_context(torch.device(device).type, config.precision):
        for start in range(0, len(real), samples.count):
            part = slice(start, start + samples.count)
            images = samples.decode(model, noise[part].to(device), torch.from_numpy(labels[part]).to(device))
            made.append(images.float().cpu().numpy())
    found = np.concatenate(made)
    return sliced_wasserstein(found, real) if np.isfinite(found).all() else None


def seen_of(old_checkpoint: bytes) -> int:
    """How far the training came whose checkpoint this is, in one file."""
    from nfm.trainers.checkpoint import unpack

    return int(unpack(old_checkpoint)[1]["examples_seen"])


def newest_checkpoint(out: Path) -> int:
    """The examples seen of the newest checkpoint, 0 where there is none."""
    if is_remote(out):
        return newest(out)
    return max((int(name) for name in names_in(out / CHECKPOINTS) if name.isdecimal()), default=0)


def _put_checkpoint(out: Path, resume: Resume, checkpoint: Path) -> None:
    """Brings a checkpoint to the bucket, with the log and the snapshots so far."""
    if not resume.elsewhere:
        return
    seen, log = int(checkpoint.name), out / temporary_name(METRICS)
    shutil.copyfile(out / METRICS, log)  # lines are added to the log meanwhile
    try:
        snapshots = [file for name, file in files_of(out).items() if name.seen is not None and name.seen <= seen]
        resume.put(seen, {**{path.name: path for path in checkpoint.iterdir()}, METRICS: log}, snapshots)
    finally:
        log.unlink()


def _bring_checkpoint(out: Path, resume: Resume) -> None:
    """Brings the newest checkpoint of another machine here, with its log, if it is newer than those that are here."""
    if (seen := resume.newest()) > newest_checkpoint(out):
        folder = out / CHECKPOINTS / f"{seen:012d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        resume.bring(folder)
        (folder / METRICS).replace(out / METRICS)


def left_files(out: Path) -> list[str]:
    """What a training leaves in its folder: the averaged weights, and what `kept_files` names."""
    return [WEIGHTS, *files_of(out).values(), *kept_files(out)]


def kept_files(out: Path) -> list[str]:
    """What a finished training leaves beside its weights."""
    states = [path for path in sorted((out / CHECKPOINTS).rglob("*")) if path.is_file()]
    return [*(str(path.relative_to(out)) for path in (*states, *grids_of(out).values())), METRICS]


def parameter_count(model: nn.Module) -> int:
    """The number of values in a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def over_all(lines: Sequence[Mapping[str, float]], unit: str) -> dict[str, float]:
    """The rate and the share of waiting for data of a whole training, from its lines, which tell those of their time.

    Time between two calls of a training that was stopped is in no line.
    """
    seen = seconds = waited = 0.0
    for line in lines:
        took = (line[f"{unit}_seen"] - seen) / max(line[f"{unit}_per_second"], 1e-9)
        seen, seconds, waited = line[f"{unit}_seen"], seconds + took, waited + took * line["data_wait_share"]
    seconds = max(seconds, 1e-9)
    return {f"{unit}_per_second": round(seen / seconds, 6), "data_wait_share": round(waited / seconds, 6)}
