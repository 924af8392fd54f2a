"""Grids of samples: the same noises each time, a row a class, for `nfm sample` and while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfm.stages.display.pictures import save_grid
from nfm.storage.format import philox

if TYPE_CHECKING:
    import torch

FOLDER = "samples"  # of an artifact: grids of a training, named by the examples seen


def noises(seed: int, count: int, image_shape: Sequence[int]) -> np.ndarray:
    """The noises from which samples are drawn: float32 [count, *image_shape], the same ones at every call."""
    eps = philox.normals(seed, 0, np.arange(count), int(np.prod(image_shape)), purpose="samples")
    return eps.reshape(count, *image_shape)


def draw_grid(
    path: Path,
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    image_shape: Sequence[int],
    classes: int,
    count: int,
    seed: int,
    device: str,
    image_dtype: str,
) -> None:
    """Draws `count` images, class after class, of the noises (seed, 0), (seed, 1) ... as one picture with titles.

    decode: noise [B, C, H, W], labels [B] -> images [B, C, H, W] in [-1, 1]; image_dtype: of the data, floats are
    latents. The picture's format is that of the path's ending.
    """
    import torch

    labels = torch.arange(count) % max(classes, 1)
    with torch.no_grad():
        noise = torch.from_numpy(noises(seed, count, image_shape))
        images = decode(noise.to(device), labels.to(device)).float().cpu().numpy()
    save_grid(path, images, image_dtype=image_dtype, labels=labels.numpy() if classes else None)


def path_of(out: Path, seen: int) -> Path:
    """The grid that was drawn when so many examples were seen."""
    return out / FOLDER / f"{seen:012d}.png"


def grids_of(out: Path) -> dict[int, Path]:
    """The grids of a training by the examples seen, the first ones first."""
    return {int(path.stem): path for path in sorted((out / FOLDER).glob(f"{'[0-9]' * 12}.png"))}
