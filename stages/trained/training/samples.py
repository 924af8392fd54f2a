"""Samples of a training while it goes on: grids, and their distance to real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.display.watching.grids import draw_grid, noises
from nfm.stages.trained.devices.precision import precision_context
from nfm.stages.trained.training.section import TrainingSection

if TYPE_CHECKING:
    import torch

DISTANCE = "samples_sliced_w2"  # of samples while training, in the log


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


def draw(
    path: Path, model: Any, samples: Samples, built: Mapping[str, Any], config: TrainingSection, device: str
) -> None:
    """A grid of samples by this model, which was `built` so."""
    import torch

    path.parent.mkdir(exist_ok=True)
    with precision_context(torch.device(device).type, config.precision):
        draw_grid(
            path, partial(samples.decode, model), built["image_shape"], built["classes"], samples.count, config.seed,
            device, samples.image_dtype,
        )  # fmt: skip


def distance(model: Any, samples: Samples, config: TrainingSection, device: str) -> float | None:
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
