"""The floor: the distance of real held-out images, with the labels of the samples, drawn several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.evaluation.table import distance_key

if TYPE_CHECKING:
    from nfm.stages.evaluation.distances import Reference
    from nfm.storage import ImageDataset

DRAWS = 5
FULLEST = 2 / 3  # of the held-out images in one draw, at most: fuller draws are too alike to have a spread


def like(labels: np.ndarray, heldout: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Sorted rows of a seeded draw without repetition: for each of `labels` a held-out image of that label.

    Where a label has too few, other images stand in. `heldout` has the labels of the held-out images, at least as many.
    """
    order = np.random.default_rng(seed).permutation(len(heldout))
    given = heldout[order]
    wanted = dict(zip(*(found.tolist() for found in np.unique(labels, return_counts=True))))
    chosen = np.zeros(len(order), bool)
    for label, count in wanted.items():
        chosen[np.flatnonzero(given == label)[:count]] = True
    chosen[np.flatnonzero(~chosen)[: len(labels) - chosen.sum()]] = True
    return np.sort(order[chosen])


def measure(reference: Reference, heldout: ImageDataset, labels: np.ndarray) -> dict[str, Any]:
    """All distances of a draw; its distance in features is the mean over draws, `spread` their standard deviation.

    Draws share held-out images, which makes them alike. So the variance is divided by 1 - n/N, as of draws without
    repetition of n from N (Cochran, Sampling Techniques, 1977, section 2.6). There is no spread for points, which have
    an error of their own, or where a draw takes nearly all held-out images.
    """
    own, seed = heldout.labels(np.arange(len(heldout))), reference.config.seed
    rows = [like(labels, own, (seed, draw)) for draw in range(DRAWS)]
    row = reference.distances(heldout.images(rows[0]), own[rows[0]])
    if reference.config.features == "none" or len(labels) > FULLEST * len(own):
        return row
    key = distance_key(reference.config)
    each = [row[key], *(reference.to_features(heldout.images(other)) for other in rows[1:])]
    spread = np.std(each, ddof=1) / (1 - len(labels) / len(own)) ** 0.5
    return {**row, key: float(np.mean(each)), "spread": float(spread), "floor_draws": DRAWS}
