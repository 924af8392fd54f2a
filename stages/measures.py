"""One row of the evaluation: distances of a sampler's images to the training set, its speeds, a student's curvature."""

from __future__ import annotations

import functools
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages import features, student
from nfm.stages.pictures import as_pixels, to_uint8
from nfm.stages.sampling import Sampler, draw, initial, velocity
from nfm.stages.stage import Inputs, Reporter, Stopped
from nfm.stages.training import precision_context
from nfm.storage import ImageDataset, PairStore, atomic

if TYPE_CHECKING:
    from nfm.stages.evaluate import EvaluateConfig

Row = dict[str, Any]
SHOWN = 64
CURVATURE_STEPS = 128
# Columns that only a sampler has.
NOT_SAMPLED = ["coupling", "sampler", "nfe", "guidance", "images_per_second", "batch", "latency_seconds", "parameters"]


@dataclass(frozen=True)
class Bench:
    """What every row is measured with; the training set's features are taken once, when a row first needs them."""

    config: EvaluateConfig
    inputs: Inputs
    out: Path
    device: str
    report: Reporter

    @functools.cached_property
    def source(self) -> ImageDataset:
        return ImageDataset.open(self.inputs["data"], "train")

    @functools.cached_property
    def network(self) -> Any:
        return features.load(self.inputs["features"], self.device)

    @functools.cached_property
    def reference(self) -> np.ndarray:
        self.report.say("taking the features of the training set")
        return self._features_of(self.source, len(self.source))

    @functools.cached_property
    def heldout(self) -> ImageDataset:
        return ImageDataset.open(self.inputs["data"], "heldout")

    @property
    def count(self) -> int:
        """Images a row: distances of few images are larger, so every row, the floor too, has the same number."""
        return min(self.config.samples, len(self.heldout))

    def floor(self) -> Row:
        """The distance of as many real images that the training set does not hold: a perfect sampler's."""
        found = self._features_of(self.heldout, self.count)
        return {"name": "floor", "model": "floor", **dict.fromkeys(NOT_SAMPLED), **self._distances(found)}

    def sampler(self, sampler: Sampler, picture: Path) -> Row:
        """A sampler's distances, best throughput and latency; its first images go to `picture`."""
        config = self.config
        found: list[np.ndarray] = []
        shown: list[np.ndarray] = []
        for images in draw(sampler.decode, self.source, self.count, config.seed, config.batch_size, self.device):
            if self.report.stopping:
                raise Stopped
            # Pixels are measured as the bytes that a file would hold, latents as they are.
            measured = to_uint8(images) if self.source.dtype == "uint8" else np.nan_to_num(images)
            found.append(features.extract(self.network, measured))
            if len(shown) * config.batch_size < SHOWN:
                shown.append(images)
            self.report.progress(sum(len(part) for part in found), self.count, "images", row=sampler.name)
        data = io.BytesIO()
        np.savez_compressed(data, images=as_pixels(np.concatenate(shown)[:SHOWN], self.source.dtype))
        atomic.write_bytes(picture, data.getvalue())
        described = {key: value for key, value in sampler._asdict().items() if key != "decode"}
        return {**described, **self._distances(np.concatenate(found)), **self._speed(sampler)}

    def curvature(self, role: str) -> Row:
        """How far a student's paths are from straight, per dimension, on 128 uniform Euler steps."""
        import torch

        from nfm.trainers.solvers import curvature

        trajectories = self.config.curvature_trajectories
        noise, labels = initial(self.source, np.arange(trajectories), self.config.seed, self.device)
        model = student.load(self.inputs[role], self.device)
        with torch.no_grad(), precision_context(noise.device.type, self.config.precision):
            value = float(curvature(velocity(model, labels), noise, CURVATURE_STEPS))
        return {
            "model": "student",
            "coupling": coupling_of(self.inputs, role),
            "value": value,
            "steps": CURVATURE_STEPS,
            "trajectories": trajectories,
        }

    def _features_of(self, split: ImageDataset, count: int, chunk: int = 5000) -> np.ndarray:
        parts = [np.arange(start, min(start + chunk, count)) for start in range(0, count, chunk)]
        return np.concatenate([features.extract(self.network, split.images(rows)) for rows in parts])

    def _distances(self, found: np.ndarray) -> Row:
        """FD-CNN and KID with its standard error, of features [N, F] against the training set's."""
        from nfm.trainers.metrics import frechet_distance, kid

        size = min(self.config.kid_size, len(found), len(self.reference))
        mean, error = kid(found, self.reference, self.config.kid_subsets, size, self.config.seed)
        distance = float(frechet_distance(found, self.reference))
        return {"samples": len(found), "fd_cnn": distance, "kid": mean, "kid_error": error, "kid_size": size}

    def _speed(self, sampler: Sampler) -> Row:
        """Images a second at the best of a few batch sizes, and seconds for one image (median of five)."""
        rates = {batch: batch / self._seconds(sampler, batch, repeats=1) for batch in self.config.speed_batches}
        best = max(rates, key=lambda batch: rates[batch])
        latency = self._seconds(sampler, 1, repeats=5)
        return {"images_per_second": rates[best], "batch": best, "latency_seconds": latency}

    def _seconds(self, sampler: Sampler, batch: int, repeats: int) -> float:
        import torch

        noise, labels = initial(self.source, np.arange(batch), 0, self.device)
        taken = []
        for _ in range(repeats + 1):  # the first one warms up
            started = time.perf_counter()
            with torch.no_grad():
                sampler.decode(noise, labels).float().cpu()
            taken.append(time.perf_counter() - started)
        return float(np.median(taken[1:]))


def coupling_of(inputs: Inputs, role: str) -> str:
    """The coupling that a student was trained on; role `student:x` belongs to the store `pairs:x`."""
    return PairStore.open(inputs[role.replace("student", "pairs")]).spec.coupling
