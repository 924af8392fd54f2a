"""The potential: one dual vector for each class.

Semidiscrete transport uses it to assign an image of the class to a noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from nfm.stages.base import Inputs, Reporter, Result, Section, StageError, Stopped, Unfit, operational
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.timing import Clock
from nfm.stages.trained.devices.where import DeviceField
from nfm.stages.trained.training.section import blaming
from nfm.storage import ImageDataset
from nfm.storage.files import atomic
from nfm.storage.files.small_files import MOST_STATE_BYTES, read_bytes

if TYPE_CHECKING:
    import torch

    from nfm.trainers.couplings.semidiscrete import Ascent, ChiSquared, Fitted, SemidiscreteOT, State
    from nfm.trainers.couplings.semidiscrete_targets import Targets

NAME = "potential"
VERSION = 1
VECTORS, FACTS = "potential.safetensors", "potential.json"
CHECKPOINT = "checkpoint.safetensors"  # the class in progress
FINISHED = "finished.safetensors"  # the finished classes


class PotentialConfig(Section):
    """The `[potential]` table. `samples` is the number of noises for each class; `chi2` can end a class earlier.

    With n noises, the chi^2 of N images falls to about (N - 1) / n at best. So the budget decides for a large class.
    `gamma` scales the steps, see `semidiscrete.fit`.
    """

    seed: int = Field(0, ge=0)
    samples: int = Field(400_000, ge=1)
    batch_size: int = Field(1024, ge=3)
    gamma: float = Field(0.3, gt=0, allow_inf_nan=False)
    chi2: float = Field(1e-3, gt=0, allow_inf_nan=False)
    check_every: int = Field(100_000, ge=1)
    device: DeviceField = operational("auto")
    save_every: int = operational(50_000, ge=1)


def run(config: PotentialConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Fits the classes one after another.

    Each is saved when it is finished; an unfinished one continues from its checkpoint.
    """
    from nfm.trainers.couplings.semidiscrete import Ascent

    train = ImageDataset.open(inputs["data"], "train")
    device = pick_device(config.device)
    rows = rows_by_label(train)
    with blaming("config section [potential]"):
        ascent = Ascent(
            config.samples, config.batch_size, config.gamma, config.chi2, config.check_every, config.seed
        )  # fmt: skip
    work = _Work(out, report, rows)
    for label in rows:
        if label not in work.finished:
            _fit(label, ascent, train, rows, work, config, device, report)
    return _publish(work, train, config, out, report)


def cost(config: PotentialConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What fitting costs at most: every noise against every image of one class, of as many noises a class."""
    dimension, classes = math.prod(facts["image_shape"]), max(facts.get("classes", 0), 1)
    most = Cost(
        config.samples * classes, "samples", told="at most", flops=2.0 * config.samples * facts["images"] * dimension
    )
    if clock is None:
        return most
    try:
        rate = clock.assigning(pick_device(config.device), dimension, facts["images"] // classes, config.batch_size)
    except Unfit as error:
        return replace(most, unknown=f"no time ({error})")
    return replace(most, seconds=config.samples * classes / rate)


def load_coupling(folder: Path, source: ImageDataset, device: str = "cpu") -> SemidiscreteOT:
    """The coupling of a fitted potential. Images are read from `source`, the split that it was fitted on, when needed.

    Raises StageError if the files are damaged or `source` is other data.
    """
    from nfm.trainers.checkpoint import CheckpointError, unpack
    from nfm.trainers.couplings.semidiscrete import SemidiscreteOT

    facts = atomic.read_json(folder / FACTS)
    if facts["data"] != source.content_digest or facts["split"] != source.split:
        raise StageError(
            f"{folder}: fitted on {facts['split']} of data {facts['data'][:12]}, not on {source.split} of "
            f"{source.content_digest[:12]}; fit a potential on this data (`nfm run potential`)"
        )
    try:
        vectors, _ = unpack(read_bytes(folder / VECTORS, MOST_STATE_BYTES))
    except CheckpointError as error:
        raise StageError(f"{folder / VECTORS}: {error}; `nfm audit {folder}` says what else is wrong") from error
    rows = rows_by_label(source)
    potentials = {int(name): vector for name, vector in vectors.items()}
    return SemidiscreteOT(lambda label: class_targets(source, rows[label], device), potentials)


def rows_by_label(source: ImageDataset) -> dict[int, np.ndarray]:
    """The rows of each class that has any, ascending. Data without classes is the single class -1."""
    labels = source.labels(np.arange(len(source)))
    return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}


def class_targets(source: ImageDataset, rows: np.ndarray, device: str) -> Targets:
    """The images of these rows as targets, read from the shards of the data set block by block."""
    import torch

    from nfm.trainers.couplings.semidiscrete_targets import Targets

    def read(start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(source.to_float(source.images(rows[start:stop])))

    return Targets(torch.from_numpy(rows), read, device)


def _fit(
    label: int,
    ascent: Ascent,
    train: ImageDataset,
    rows: Mapping[int, np.ndarray],
    work: _Work,
    config: PotentialConfig,
    device: str,
    report: Reporter,
) -> None:
    """Fits one class from its saved state and saves it. Raises Stopped after saving."""
    from nfm.trainers.couplings.semidiscrete import fit

    place = list(rows).index(label)
    total = len(rows) * config.samples
    begun = work.begun(label)
    report.progress(place * config.samples + (begun.step * ascent.batch_size if begun else 0), total, "samples")

    def save(state: State) -> None:
        work.save((label, state))

    def log(seen: int, chi2: ChiSquared) -> None:
        report.log("chi2", label=label, samples=seen, chi2=chi2.value, error=chi2.error, chi2_samples=chi2.samples)
        done = place * config.samples + min(seen, config.samples)
        figures: dict[str, Any] = {"chi2": round(chi2.value, 5), "class": _called(train, label)}
        report.progress(done, total, "samples", workers=(), **figures)

    targets = class_targets(train, rows[label], device)
    fitted = fit(
        targets,
        ascent,
        label,
        state=begun,
        save=save,
        save_every=config.save_every,
        log=log,
        stop=lambda: report.stopping,
    )
    if fitted is None:
        raise Stopped
    work.finish(label, fitted)


class _Work:
    """What is done so far: finished classes in one file, the state of the current class in another, which is saved more
    often.
    """

    def __init__(self, out: Path, report: Reporter, rows: Mapping[int, np.ndarray]) -> None:
        self._folder, self._report, self._rows = out, report, rows
        self.finished: dict[int, torch.Tensor] = {}
        self.facts: dict[int, dict[str, Any]] = {}
        self._begun: tuple[int, State] | None = None
        self._load()

    def begun(self, label: int) -> State | None:
        """The saved state of this class, if it is the current one."""
        return self._begun[1] if self._begun is not None and self._begun[0] == label else None

    def finish(self, label: int, fitted: Fitted) -> None:
        """Saves the potential of a class and its figures."""
        self.finished[label] = fitted.potential
        self.facts[label] = {
            "rows": len(fitted.potential),
            "samples": fitted.samples,
            "chi2": fitted.chi2.value,
            "chi2_error": fitted.chi2.error,
            "chi2_samples": fitted.chi2.samples,
            "stopped": fitted.stopped,
        }
        facts = {str(label): facts for label, facts in self.facts.items()}
        self._write(FINISHED, {str(label): vector for label, vector in self.finished.items()}, {"facts": facts})

    def save(self, begun: tuple[int, State]) -> None:
        """Replaces the checkpoint of the current class."""
        label, state = begun
        tensors = {"potential": state.potential, "average": state.average}
        self._write(CHECKPOINT, tensors, {"label": label, **state.figures()})

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        from nfm.trainers.checkpoint import pack

        self._report.check_lock()
        atomic.write_bytes(self._folder / name, pack(tensors, meta))

    def _load(self) -> None:
        from nfm.trainers.couplings.semidiscrete import State

        with self._reading(FINISHED) as (vectors, meta):
            self.finished = {int(label): vector for label, vector in vectors.items()}
            self.facts = {int(label): facts for label, facts in (meta["facts"] if meta else {}).items()}
        if len(self.finished) < len(self._rows):
            with self._reading(CHECKPOINT) as (tensors, meta):
                if meta and meta["label"] not in self.finished:
                    self._begun = meta["label"], State.of(meta, tensors["potential"], tensors["average"])
        for label, size in self._sizes():
            if label not in self._rows or size != len(self._rows[label]):
                raise StageError(
                    f"{self._folder}: label {label} has {size} images there, {len(self._rows.get(label, ()))} in the "
                    f"data; remove {FINISHED} and {CHECKPOINT} to fit from the start"
                )
        going = f", and {self._begun[1].step:,} steps of the next" if self._begun else ""
        if self.finished or self._begun:
            self._report.say(f"continuing after {len(self.finished)} of {len(self._rows)} classes{going}")

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        """The tensors and facts of a file; none if there is no file. Raises StageError if the file is invalid."""
        from nfm.trainers.checkpoint import CheckpointError, unpack

        path = self._folder / name
        try:
            yield unpack(read_bytes(path, MOST_STATE_BYTES)) if path.exists() else ({}, {})
        except (CheckpointError, KeyError) as error:
            lost = "the finished classes" if name == FINISHED else "the class in hand"
            problem = error.__cause__ or error
            raise StageError(f"{path}: no state of a fit ({problem!r}); remove it to fit {lost} anew") from error

    def _sizes(self) -> Iterator[tuple[int, int]]:
        for label, vector in self.finished.items():
            yield label, len(vector)
        if self._begun is not None:
            yield self._begun[0], len(self._begun[1].potential)


def _publish(work: _Work, train: ImageDataset, config: PotentialConfig, out: Path, report: Reporter) -> Result:
    from nfm.trainers.checkpoint import pack

    (out / CHECKPOINT).unlink(missing_ok=True)
    # In a fixed order of keys, whether a class was finished in this run or read from the checkpoint.
    facts = {str(label): dict(sorted(work.facts[label].items())) for label in sorted(work.facts)}
    body = {"data": train.content_digest, "split": train.split, "classes": facts}
    atomic.write_bytes(out / VECTORS, pack({str(label): work.finished[label] for label in sorted(work.finished)}, {}))
    atomic.write_json(out / FACTS, body)
    chi2 = {label: known["chi2"] for label, known in work.facts.items()}
    missed = [label for label, known in work.facts.items() if known["stopped"] == "budget"]
    worst = max(chi2, key=lambda label: chi2[label])
    if missed:
        report.say(
            f"{len(missed)} of {len(chi2)} classes spent potential.samples = {config.samples:,} before chi^2 was "
            f"{config.chi2:g}; the worst is {chi2[worst]:.3g} ({_called(train, worst)}); twice the samples halve it"
        )
    metrics = {
        "chi2_worst": round(chi2[worst], 6),
        "chi2_mean": round(sum(chi2.values()) / len(chi2), 6),
        "chi2_target": config.chi2,
        "classes": len(chi2),
        "stopped_by_budget": len(missed),
        "samples": sum(known["samples"] for known in work.facts.values()),
    }
    return Result(payload=[VECTORS, FACTS], metrics=metrics, files=[FINISHED])


def _called(source: ImageDataset, label: int) -> str:
    return source.classes[label] if source.classes else "all images"
