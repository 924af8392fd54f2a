"""Pictures of images: uint8 from model space, and grids as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from nfm.storage import atomic


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] to uint8, rounded and clipped; values that are not finite become black."""
    return np.clip(np.rint((np.nan_to_num(images, nan=-1.0) + 1) * 127.5), 0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int = 8, gap: int = 1) -> np.ndarray:
    """uint8 images [N, C, H, W] as one picture [H', W', 3], row by row; one channel is shown grey."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (gap + (height + gap) * (index // columns), gap + (width + gap) * (index % columns))
        shown = image[:3] if channels >= 3 else image[:1].repeat(3, axis=0)
        picture[top : top + height, left : left + width] = shown.transpose(1, 2, 0)
    return picture


def save_grid(path: Path, images: np.ndarray, scale: int = 3) -> None:
    """Write images [N, C, H, W], uint8 or float in [-1, 1], as one PNG, each pixel `scale` wide."""
    from PIL import Image

    picture = grid(images if images.dtype == np.uint8 else to_uint8(images))
    data = io.BytesIO()
    Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1)).save(data, "PNG")
    atomic.write_bytes(path, data.getvalue())
