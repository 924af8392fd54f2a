"""Pictures of images: uint8 from model space, latents as false colours, and grids as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from nfm.storage.files import atomic

SHOWN_PERCENTILES = (1.0, 99.0)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] to uint8, rounded and clipped; values that are not finite become black."""
    return np.clip(np.rint((np.nan_to_num(images, nan=-1.0) + 1) * 127.5), 0, 255).astype(np.uint8)


def false_colours(latents: np.ndarray) -> np.ndarray:
    """Latents [N, C, H, W] as uint8 pictures [N, 3 or 1, H, W], see FALSE_COLOURS; nothing is decoded."""
    shown = np.nan_to_num(np.asarray(latents, np.float32), posinf=0.0, neginf=0.0)
    shown = shown[:, :3] if shown.shape[1] >= 3 else shown.mean(axis=1, keepdims=True)
    low, high = (np.percentile(shown, q, axis=(0, 2, 3), keepdims=True) for q in SHOWN_PERCENTILES)
    return to_uint8(2 * (shown - low) / np.maximum(high - low, 1e-12) - 1)


FALSE_COLOURS = (
    "false colours: the first three channels of the latents, or the mean of fewer, from the 1st to the 99th percentile"
)


def in_false_colours(image_dtype: str, channels: int) -> bool:
    """Whether images are shown so: latents, and pixels of so many channels that they are neither grey nor RGB."""
    return image_dtype != "uint8" or channels not in (1, 3)


def as_pixels(images: np.ndarray, image_dtype: str) -> np.ndarray:
    """What to show of images in model space, given the dtype of their store: pixels, or latents in false colours."""
    return false_colours(images) if in_false_colours(image_dtype, images.shape[1]) else to_uint8(images)


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


def save_grid(path: Path, images: np.ndarray, scale: int = 3, image_dtype: str = "uint8") -> None:
    """Write images [N, C, H, W], uint8 or floats in model space, as one PNG, each pixel `scale` wide.

    `image_dtype` is that of the store: of latents the PNG holds false colours, and says so in its text chunk.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture = grid(images if images.dtype == np.uint8 else as_pixels(images, image_dtype))
    said = PngInfo()
    if in_false_colours(image_dtype, images.shape[1]):
        said.add_text("Description", FALSE_COLOURS)
    data = io.BytesIO()
    Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1)).save(data, "PNG", pnginfo=said)
    atomic.write_bytes(path, data.getvalue())
