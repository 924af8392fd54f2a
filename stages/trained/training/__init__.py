"""The training that the three trained stages share: here, or in other processes, resumed and stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfm.stages.base import Inputs, Reporter, StageError, Stopped, call
from nfm.stages.display.watching.grids import path_of
from nfm.stages.display.watching.lines import Lines
from nfm.stages.trained.devices import launched
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import autocast_dtype, check_precision, matrix_products
from nfm.stages.trained.training import checkpoints
from nfm.stages.trained.training.samples import DISTANCE, Samples, distance, draw
from nfm.stages.trained.training.section import TrainingSection, recipe
from nfm.stages.trained.weights import SNAPSHOTS, WEIGHTS, file_of, files_of
from nfm.storage.files import atomic
from nfm.storage.files.copies.resume import Resume
from nfm.storage.files.small_files import MOST_STATE_BYTES, read_bytes

if TYPE_CHECKING:
    from torch import nn

    from nfm.trainers.loop import Averages, Loss


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
        checkpoints.bring(out, resume)

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
            draw(path_of(out, seen), model, task.samples, task.architecture, config, device)
            lines.picture(seen, path_of(out, seen))
            if task.samples.real is not None:
                found = distance(model, task.samples, config, device)
                if found is not None:
                    lines.add({f"{unit}_seen": seen, DISTANCE: found})

    def tick(done: int) -> None:
        report.progress(done, plan.examples, unit, workers=(), **shown)

    try:
        with ExitStack() as kept:
            folder = kept.enter_context(
                CheckpointFolder(
                    out / checkpoints.CHECKPOINTS,
                    config.keep_checkpoints,
                    report.check_lock,
                    partial(checkpoints.put, out, resume),
                    own=resume.elsewhere,
                )
            )
            kept.enter_context(matrix_products(config.precision))
            found, old = folder.read(), None
            if found is None and (out / checkpoints.OLD_CHECKPOINT).exists():
                old = read_bytes(out / checkpoints.OLD_CHECKPOINT, MOST_STATE_BYTES)
            seen = found[1]["examples_seen"] if found else checkpoints.seen_of(old) if old else 0
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
        (out / checkpoints.OLD_CHECKPOINT).unlink(missing_ok=True)
    for width, average in trained.emas.items():
        write(out / file_of(width), average)
    write(out / WEIGHTS, trained.ema)


def left_files(out: Path) -> list[str]:
    """What a training leaves in its folder: the averaged weights, and what `kept_files` names."""
    return [WEIGHTS, *files_of(out).values(), *checkpoints.kept_files(out)]


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
