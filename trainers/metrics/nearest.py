"""The distance from each sample to the nearest image of a training set. It is near zero for memorised images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def nearest(samples: Tensor, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Distances [N] and row numbers [N] of the images nearest to samples [N, ...], over all rows of `chunks` [*, ...].

    The distance is the root of the mean squared difference per value, so it is in the units of the images, whatever
    their size. Candidates are found by float32 products with a chunk; the distance to the best one is then exact.
    """
    x = samples.flatten(1)
    best = torch.full((len(x),), torch.inf, device=x.device)
    where = torch.zeros(len(x), dtype=torch.long, device=x.device)
    exact = torch.zeros(len(x), device=x.device)
    seen = 0
    for chunk in chunks:
        y = chunk.flatten(1).to(x.device)
        # |x|^2 is the same for every candidate, so |y|^2 - 2 x.y is compared.
        values, rows = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2).min(dim=1)
        better = values < best
        found = rows[better]
        best[better] = values[better]
        where[better] = found + seen
        exact[better] = (x[better] - y[found]).square().mean(dim=1).sqrt()
        seen += len(y)
    if not seen:
        raise ValueError("there are no training images to be near to")
    return exact, where
