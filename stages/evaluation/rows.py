"""One row of the evaluation: the distances of a sampler's images to the training set, speeds, and curvature."""

from __future__ import annotations

import functools
import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Inputs, Reporter, StageError, Stopped, Unfit
from nfm.stages.display.pictures import as_pixels, to_uint8
from nfm.stages.display.points import are_points
from nfm.stages.evaluation import floor
from nfm.stages.evaluation.config import CURVATURE_STEPS
from nfm.stages.evaluation.distances import EXACT_VALUES, Reference
from nfm.stages.trained import student
from nfm.stages.trained.devices.machine import machine
from nfm.stages.trained.devices.precision import precision_context
from nfm.stages.trained.sampling import Sampler, draw, fresh_noise, initial, variant_of
from nfm.storage import ImageDataset
from nfm.storage.files import atomic

if TYPE_CHECKING:
    from nfm.stages.evaluation.config import EvaluateConfig

Row = dict[str, Any]
SHOWN = 64
# Columns that only a sampler has.
NOT_SAMPLED = ["coupling", "sampler", "nfe", "guidance", "images_per_second", "batch", "latency_seconds", "parameters"]

_DIVERGED = "look at the loss of its training in metrics.jsonl: one that diverged wants a smaller learning_rate"


@dataclass(frozen=True)
class Bench:
    """What every row is measured with."""

    config: EvaluateConfig
    inputs: Inputs
    out: Path
    device: str
    report: Reporter

    @functools.cached_property
    def source(self) -> ImageDataset:
        return ImageDataset.open(self.inputs["data"], "train")

    @functools.cached_property
    def drawn(self) -> ImageDataset:
        """What the models were trained on: the latents of `source`, if there are any. Its rows have the same labels."""
        return ImageDataset.open(self.inputs.get("latents", self.inputs["data"]), "train")

    @functools.cached_property
    def reference(self) -> Reference:
        return Reference(self.config, self.inputs, self.source, self.count, self.device, self.report)

    @functools.cached_property
    def heldout(self) -> ImageDataset:
        return ImageDataset.open(self.inputs["data"], "heldout")

    @functools.cached_property
    def machine(self) -> str:
        """A description of the machine for speeds, without anything that identifies it."""
        import torch

        kind = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device
        return f"{machine()['cpu']}, {kind}, {torch.get_num_threads()} threads"

    @property
    def count(self) -> int:
        return self.config.count(len(self.heldout))

    @property
    def labels(self) -> np.ndarray:
        """The labels of a row's samples: those of the first training images, see `sampling.initial`."""
        return self.source.labels(np.arange(self.count) % len(self.source))

    def check(self) -> None:
        """Raises StageError now for anything that would make a row fail later."""
        if self.config.features != "none":
            _ = self.reference.network
        elif (values := int(np.prod(self.source.image_shape))) > EXACT_VALUES:
            raise Unfit(
                f'evaluate.features = "none" compares values directly, which says something of up to {EXACT_VALUES} of '
                f'them; these images have {values}: use evaluate.features = "cnn"'
            )

    def floor(self) -> Row:
        """The distances of as many real images that are not in the training set: what a perfect sampler would get."""
        found = floor.measure(self.reference, self.heldout, self.labels)
        return {"name": "floor", "model": "floor", **dict.fromkeys(NOT_SAMPLED), **found, "machine": self.machine}

    def sampler(self, sampler: Sampler, picture: Path) -> Row:
        """A sampler's distances, best throughput and latency. Its first images go to `picture`."""
        config = self.config
        parts: list[np.ndarray] = []
        shown: list[np.ndarray] = []
        self.report.progress(0, self.count, "images", row=sampler.name)
        for images in draw(sampler.decode, self.drawn, self.count, config.seed, config.batch_size, self.device):
            if self.report.stopping:
                raise Stopped
            _refuse_broken(sampler.name, images, config)
            # Pixels are measured as the bytes of a file, latents unchanged.
            parts.append(to_uint8(images) if self.source.dtype == "uint8" else images)
            if len(shown) * config.batch_size < SHOWN:
                shown.append(images)
            self.report.progress(sum(len(part) for part in parts), self.count, "images", row=sampler.name)
        data = io.BytesIO()
        first = np.concatenate(shown)[:SHOWN]
        # Points are kept unchanged, to be drawn in the plane.
        kept = first if are_points(self.source.image_shape) else as_pixels(first, self.source.dtype)
        own = self.source.labels(np.arange(len(first)) % len(self.source))
        np.savez_compressed(data, images=kept, labels=own)
        atomic.write_bytes(picture, data.getvalue())
        described = {key: value for key, value in sampler._asdict().items() if key not in ("decode", "taken")}
        if sampler.taken:
            described["nfe"] = math.ceil(np.mean(sampler.taken))
        found = self.reference.distances(np.concatenate(parts), self.labels)
        return {**described, **found, **self._speed(sampler), "machine": self.machine}

    def curvature(self, role: str) -> Row:
        """How far a student's paths (never guided) are from straight, per dimension, with 128 uniform Euler steps."""
        import torch

        from nfm.trainers.flow_matching import velocity
        from nfm.trainers.solvers import curvature

        trajectories = self.config.curvature_trajectories
        noise, labels = initial(self.drawn, np.arange(trajectories), self.config.seed, self.device)
        model = student.load(self.inputs[role], self.device, self.config.ema)
        with torch.no_grad(), precision_context(noise.device.type, self.config.precision):
            value = float(curvature(velocity(model, labels), noise, CURVATURE_STEPS))
        variant = variant_of(self.inputs[role])
        if not math.isfinite(value):
            raise StageError(f"the curvature of the student on {variant} pairs is {value}: {_remedy(self.config)}")
        return {
            "model": "student",
            "coupling": variant,
            "guidance": 0.0,
            "value": value,
            "steps": CURVATURE_STEPS,
            "trajectories": trajectories,
        }

    def _speed(self, sampler: Sampler) -> Row:
        """Images per second at the best of a few batch sizes, and seconds for one image (median of five)."""
        rates = {batch: batch / self._seconds(sampler, batch, repeats=1) for batch in self.config.speed_batches}
        best = max(rates, key=lambda batch: rates[batch])
        latency = self._seconds(sampler, 1, repeats=5)
        return {"images_per_second": rates[best], "batch": best, "latency_seconds": latency}

    def _seconds(self, sampler: Sampler, batch: int, repeats: int) -> float:
        import torch

        slots = np.arange(batch)
        noise, labels = initial(self.drawn, slots, 0, self.device)
        fresh = fresh_noise(0, slots, noise)
        taken = []
        for _ in range(repeats + 1):  # the first run is a warm-up
            started = time.perf_counter()
            with torch.no_grad():
                sampler.decode(noise, labels, fresh).float().cpu()
            taken.append(time.perf_counter() - started)
        return float(np.median(taken[1:]))


def _refuse_broken(row: str, images: np.ndarray, config: EvaluateConfig) -> None:
    """Raises StageError for values that are not finite. Replacing them would change the distance."""
    broken = int((~np.isfinite(images.reshape(len(images), -1))).any(axis=1).sum())
    if broken:
        raise StageError(
            f"row {row}: {broken} of {len(images)} samples in a batch have values that are not finite "
            f'(evaluate.precision = "{config.precision}"): {_remedy(config)}'
        )


def _remedy(config: EvaluateConfig) -> str:
    """What may help against values that are not finite, of what is not so already."""
    ways = [] if config.precision == "float32" else ['use evaluate.precision = "float32"']
    ways += ["use less guidance"] if config.guidance or config.student_guidance else []
    return ", or ".join([*ways, _DIVERGED])
