"""The training set as the reference of every row, and the distances of images to it, by name."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Inputs, Reporter, Unfit
from nfm.stages.evaluation import inception
from nfm.stages.evaluation.table import distance_key, published_key
from nfm.stages.trained import features
from nfm.storage import ImageDataset

if TYPE_CHECKING:
    import torch

    from nfm.stages.evaluation.config import EvaluateConfig
    from nfm.trainers.metrics.frechet import Gaussian
    from nfm.trainers.metrics.prdc import Manifold

PROJECTIONS = 128  # random directions of the sliced distance
NEAREST_SAMPLES = 1000  # samples for which the nearest training image is searched
EXACT_POINTS = 1000  # points of one exact assignment, whose time grows as their cube; more points form several sets
EXACT_VALUES = 4  # values of an image, at most, if points are compared without features
CHUNK = 5000  # training images in memory at a time
KEPT_BYTES = 1 << 28  # larger features of a training set are not kept for the next evaluation
# The last computed features, by their inputs: a comparison evaluates many students on one training set.
_kept: dict[tuple[Any, ...], np.ndarray] = {}


@dataclass(frozen=True)
class Reference:
    """The training set. Its features, manifolds and pixels are computed once, when a row first needs them.

    Manifolds and pixels use `count` seeded training images, as many as the samples of a row: precision, recall,
    density, coverage and the Wasserstein distances depend on both numbers.
    """

    config: EvaluateConfig
    inputs: Inputs
    source: ImageDataset
    count: int
    device: str
    report: Reporter

    @functools.cached_property
    def network(self) -> Any:
        if self.config.features == "inception":
            return inception.load(self.config.inception_weights, self.source, self.device)
        if "features" not in self.inputs:
            raise Unfit("evaluate.features is 'cnn' and no features artifact is among the inputs; give one")
        return features.load(self.inputs["features"], self.device)

    @functools.cached_property
    def features(self) -> np.ndarray:
        network = self.config.features, self.inputs.get("features"), self.config.inception_weights
        made_of = (self.source.content_digest, self.source.split, *network, self.device)
        if made_of not in _kept:
            self.report.say("taking the features of the training set")
            _kept.clear()
            taken = np.concatenate([self.extract(images) for images in self._chunks()])
            if taken.nbytes > KEPT_BYTES:
                return taken
            _kept[made_of] = taken
        return _kept[made_of]

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        from nfm.trainers.metrics.frechet import fit

        return fit(self.features)

    @functools.cached_property
    def published(self) -> Gaussian:
        """The statistics that the config names."""
        import torch

        from nfm.trainers.metrics.frechet import Gaussian

        assert self.config.statistics is not None
        mean, covariance = inception.statistics(self.config.statistics)
        return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))

    @functools.cached_property
    def subset(self) -> np.ndarray:
        random = np.random.default_rng(self.config.seed)
        return np.sort(random.choice(len(self.source), min(self.count, len(self.source)), replace=False))

    @functools.cached_property
    def manifold(self) -> Manifold:
        from nfm.trainers.metrics.prdc import manifold

        return manifold(self.features[self.subset])

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        return in_model_space(self.source.images(self.subset))

    def extract(self, images: np.ndarray) -> np.ndarray:
        """Features [N, F] float32 of images [N, C, H, W]: uint8 pixels, or latents as floats."""
        module = inception if self.config.features == "inception" else features
        return module.extract(self.network, images)

    def distances(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """All distances of images [N, C, H, W], in the form of a file, that were requested with labels [N]."""
        found = in_model_space(images)
        if self.config.features == "none":
            return {"samples": len(images), **self._of_points(found), **self._of_pixels(found)}
        row = self._of_features(self.extract(images), labels)
        return {"samples": len(images), **row, **self._of_pixels(found), "nearest": self._nearest(found)}

    def to_features(self, images: np.ndarray) -> float:
        """The distance in features alone, of images [N, C, H, W] in the form of a file."""
        from nfm.trainers.metrics.frechet import frechet_distance

        return frechet_distance(self.extract(images), self.gaussian)

    def _of_features(self, found: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        from nfm.trainers.metrics.frechet import FEWEST, fd_infinity, fewest_for_infinity, frechet_distance, kid
        from nfm.trainers.metrics.prdc import manifold, prdc

        size = min(self.config.kid_size, len(found), len(self.features))
        mean, error = kid(found, self.features, self.config.kid_subsets, size, self.config.seed)
        row: dict[str, Any] = {
            distance_key(self.config): frechet_distance(found, self.gaussian),
            "kid": mean,
            "kid_error": error,
            "kid_size": size,
        }
        if self.config.statistics is not None:
            row[published_key(self.config)] = frechet_distance(found, self.published)
        # Too few samples give no reliable value: the columns stay empty.
        enough = len(found) >= fewest_for_infinity(found.shape[1])
        row["fd_infinity"] = fd_infinity(found, self.gaussian, seed=self.config.seed) if enough else None
        if min(len(found), len(self.subset)) >= FEWEST:
            row |= prdc(self.manifold, manifold(found))._asdict()
        if self.source.classes and self.config.features == "cnn":
            row["agreement"] = float((features.classify(self.network, found) == labels).mean())
        return row

    def _of_points(self, found: np.ndarray) -> dict[str, Any]:
        """The mean of W2 over disjoint sets of points, each compared with its own training points, and the error of the
        mean.

        One set is not enough. If the modes are separate, a set has a few points too many or too few in each, and moving
        them costs more than the errors of a good sampler.
        """
        from nfm.trainers.metrics.wasserstein import wasserstein2

        points = min(len(found), len(self.pixels))
        size = min(points, EXACT_POINTS)
        # The subset is sorted by row, and rows are in a seeded random order. So any part of it will do.
        sets = [slice(start, start + size) for start in range(0, points - size + 1, size)]
        each = [wasserstein2(found[part], self.pixels[part]) for part in sets]
        row = {"w2": float(np.mean(each)), "w2_points": size, "w2_sets": len(sets)}
        return row if len(each) < 2 else {**row, "w2_error": float(np.std(each, ddof=1) / len(each) ** 0.5)}

    def _of_pixels(self, found: np.ndarray) -> dict[str, float]:
        from nfm.trainers.metrics.wasserstein import sliced_wasserstein

        return {"sliced_wasserstein": sliced_wasserstein(found, self.pixels, PROJECTIONS, self.config.seed)}

    def _nearest(self, found: np.ndarray) -> float:
        import torch

        from nfm.trainers.metrics.nearest import nearest

        samples = torch.from_numpy(found[:NEAREST_SAMPLES]).to(self.device)
        return float(nearest(samples, self._tensors())[0].mean())

    def _tensors(self) -> Iterator[torch.Tensor]:
        import torch

        for images in self._chunks():
            yield torch.from_numpy(in_model_space(images)).to(self.device)

    def _chunks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.source), CHUNK):
            yield self.source.images(np.arange(start, min(start + CHUNK, len(self.source))))


def in_model_space(images: np.ndarray) -> np.ndarray:
    """Pixels [N, C, H, W] as models see them, float32 in [-1, 1]. Latents are unchanged."""
    return images.astype(np.float32) / np.float32(127.5) - 1 if images.dtype == np.uint8 else images.astype(np.float32)
