"""Points of the plane as images of two values: distributions whose distances are exact and whose runs take seconds.

A point is an image [1, 1, 2] of float32, a latent to everything behind, so that a teacher of patch 1 has two tokens of
one coordinate. Both distributions have mean 0 and variance 1 in each coordinate, and no classes.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.base import Reporter, Unfit
from nfm.stages.data.source import Loaded
from nfm.storage.files.atomic import canonical_json
from nfm.storage.format import philox

POINT = (1, 1, 2)
GENERATOR = 1  # raised when the same seed gives other points

SQUARES = 4  # a side of the checkerboard; every other square is filled
BOARD = 2 * math.sqrt(3)  # its width: a coordinate, uniform over it, has variance 1

MODES = 8
SPREAD = 0.15  # standard deviation of a Gaussian over the circle's radius
RADIUS = 1 / math.sqrt(0.5 + SPREAD**2)  # variance of a coordinate is RADIUS^2 (1/2 + SPREAD^2) = 1


class Planar:
    """Points made from a seed: row i depends on (seed, i) alone, so more points leave the earlier ones as they are."""

    name: str
    licence, origin = "made by this program", "made from data.seed by nfm.stages.data.sources.planar"

    def __init__(self, points: int | None, seed: int):
        if points is None:
            raise Unfit(
                f'data.source = "{self.name}" needs data.points: how many points to make, held-out ones '
                "included; 20_000 is enough to see the shape"
            )
        self.points, self.seed = points, seed
        self.labels = np.full(points, -1, np.int64)
        self.keys = [f"{self.name}/{row:07d}" for row in range(points)]
        self.test = np.zeros(points, bool)
        self.classes: list[str] = []

    @staticmethod
    def shape_of(config: Any) -> tuple[int, int, int]:
        return POINT

    def place(self, rows: np.ndarray) -> np.ndarray:
        """The points of these rows, float64 [n, 2]."""
        raise NotImplementedError

    def load(self, rows: np.ndarray, scratch: Path, report: Reporter) -> Loaded:
        return Loaded(self.place(rows).astype(np.float32).reshape(-1, 1, 1, 2))

    def digest(self, known: Path | None = None) -> dict[str, Any]:
        recipe = {"name": self.name, "generator": GENERATOR, "points": self.points, "seed": self.seed}
        return {"digest": hashlib.sha256(canonical_json(recipe)).hexdigest(), "files": 0, "bytes": 0}

    def _uniform(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Float64 [n, count] in [0, 1)."""
        return (philox.words(self.seed, 0, rows, count, self.name) >> np.uint64(11)) * 2.0**-53


class Checkerboard(Planar):
    """Uniform on every other square of a board of 4 x 4, the lower left one among them."""

    name = "checkerboard"

    def place(self, rows: np.ndarray) -> np.ndarray:
        uniform = self._uniform(rows, 2)
        x, y = SQUARES * uniform[:, 0], SQUARES // 2 * uniform[:, 1]
        # y runs over the filled squares of x's column: the even ones in even columns, the odd ones in odd columns.
        y += np.floor(y) + np.floor(x) % 2
        return (np.stack([x, y], axis=1) / SQUARES - 0.5) * BOARD


class Gaussians(Planar):
    """Eight equal Gaussians, evenly spaced on a circle, the axes halfway between neighbours.

    A coordinate then takes four places; with the first on the horizontal axis there would be five, and a flow of two
    tokens, the coordinates, more to bend.
    """

    name = "gaussians"

    def place(self, rows: np.ndarray) -> np.ndarray:
        angle = 2 * math.pi / MODES * (np.floor(MODES * self._uniform(rows, 1)[:, 0]) + 0.5)
        centre = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return RADIUS * (centre + SPREAD * philox.normals(self.seed, 0, rows, 2, f"{self.name}/normal"))
