"""Points of the plane as images of two values. Distances between such distributions are exact, and runs take seconds.

A point is an image [1, 1, 2] of float32, which later stages treat as a latent. So a teacher of patch 1 has two tokens
of one coordinate. Both distributions have mean 0 and variance 1 in each coordinate, and no classes.
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
GENERATOR = 1  # increased when the same seed gives other points

SQUARES = 4  # squares on a side of the checkerboard; every other square is filled
BOARD = 2 * math.sqrt(3)  # its width: a uniform coordinate then has variance 1

MODES = 8
SPREAD = 0.15  # standard deviation of a Gaussian divided by the radius of the circle
RADIUS = 1 / math.sqrt(0.5 + SPREAD**2)  # the variance of a coordinate, RADIUS^2 (1/2 + SPREAD^2), is 1


class Planar:
    """Points made from a seed. Row i depends only on (seed, i), so more points do not change the earlier ones."""

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
    """Uniform on every other square of a 4 x 4 board, including the lower left one."""

    name = "checkerboard"

    def place(self, rows: np.ndarray) -> np.ndarray:
        uniform = self._uniform(rows, 2)
        x, y = SQUARES * uniform[:, 0], SQUARES // 2 * uniform[:, 1]
        # y covers the filled squares in the column of x: the even ones in even columns, the odd ones in odd columns.
        y += np.floor(y) + np.floor(x) % 2
        return (np.stack([x, y], axis=1) / SQUARES - 0.5) * BOARD


class Gaussians(Planar):
    """Eight equal Gaussians, evenly spaced on a circle, with the axes halfway between neighbours.

    A coordinate then has four centres. With a Gaussian on the horizontal axis there would be five, which is harder for
    a flow with two tokens, the coordinates.
    """

    name = "gaussians"

    def place(self, rows: np.ndarray) -> np.ndarray:
        angle = 2 * math.pi / MODES * (np.floor(MODES * self._uniform(rows, 1)[:, 0]) + 0.5)
        centre = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return RADIUS * (centre + SPREAD * philox.normals(self.seed, 0, rows, 2, f"{self.name}/normal"))
