"""Pictures of images: uint8 from model space, latents as false colours, and grids as files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfm.stages.display.classes import GridRow, rows_of
from nfm.stages.display.endings import write_picture
from nfm.stages.display.points import INK, are_points, scatter

if TYPE_CHECKING:
    from PIL.Image import Image

FONT_PIXELS = 16  # smallest height of a row in a grid
SHOWN_PERCENTILES = (1.0, 99.0)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as uint8, rounded and clipped. Values that are not finite become black."""
    return np.clip(np.rint((np.nan_to_num(images, nan=-1.0) + 1) * 127.5), 0, 255).astype(np.uint8)


def false_colours(latents: np.ndarray) -> np.ndarray:
    """Latents [N, C, H, W] as uint8 pictures [N, 3 or 1, H, W], see FALSE_COLOURS. Nothing is decoded."""
    shown = np.nan_to_num(np.asarray(latents, np.float32), posinf=0.0, neginf=0.0)
    shown = shown[:, :3] if shown.shape[1] >= 3 else shown.mean(axis=1, keepdims=True)
    low, high = (np.percentile(shown, q, axis=(0, 2, 3), keepdims=True) for q in SHOWN_PERCENTILES)
    return to_uint8(2 * (shown - low) / np.maximum(high - low, 1e-12) - 1)


FALSE_COLOURS = (
    "false colours: the first three channels of the latents, or the mean of fewer, from the 1st to the 99th percentile"
)


def in_false_colours(image_dtype: str, channels: int) -> bool:
    """Whether images are shown in false colours: latents, and pixels with a number of channels that is not
    grey or RGB.
    """
    return image_dtype != "uint8" or channels not in (1, 3)


def as_pixels(images: np.ndarray, image_dtype: str) -> np.ndarray:
    """Images in model space for display, given the dtype of their store: pixels, or latents in false colours."""
    return false_colours(images) if in_false_colours(image_dtype, images.shape[1]) else to_uint8(images)


def save_grid(
    path: Path,
    images: np.ndarray,
    scale: int = 3,
    image_dtype: str = "uint8",
    labels: Sequence[int] | np.ndarray | None = None,
) -> None:
    """Writes images [N, C, H, W], uint8 or floats in model space, as one picture in the format of the path's ending.

    Each pixel is `scale` wide, or more if a title would not fit beside a row. With `labels` the rows are sorted by
    class and have titles. `image_dtype` is that of the store: latents are shown in false colours, which the file's
    metadata says. Images of two values are drawn as points.
    """
    if are_points(images.shape[1:]) and images.dtype != np.uint8:
        write_picture(path, scatter(images))
        return
    pixels = images if images.dtype == np.uint8 else as_pixels(images, image_dtype)
    scale = max(scale, -(-FONT_PIXELS // images.shape[2]))
    said = FALSE_COLOURS if in_false_colours(image_dtype, images.shape[1]) else ""
    write_picture(path, _grid(pixels, rows_of(labels, len(images)), scale), said)


def _grid(images: np.ndarray, rows: Sequence[GridRow], scale: int, gap: int = 1) -> Image:
    """uint8 images [N, C, H, W] in rows on white, with titles on their left. One channel is shown as grey."""
    from PIL import Image, ImageDraw, ImageFont

    _, channels, height, width = images.shape
    columns = max(len(row.images) for row in rows)
    sheet = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for along, number in enumerate(row.images):
            top, left = gap + (height + gap) * down, gap + (width + gap) * along
            image = images[number]
            shown = image[:3] if channels >= 3 else image[:1].repeat(3, axis=0)
            sheet[top : top + height, left : left + width] = shown.transpose(1, 2, 0)
    tiles = Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))
    font = ImageFont.load_default(FONT_PIXELS - 3)
    margin = max(int(font.getlength(row.title)) for row in rows)
    margin += 2 * scale + 4 if margin else 0
    picture = Image.new("RGB", (tiles.width + margin, tiles.height), "white")
    picture.paste(tiles, (margin, 0))
    pen = ImageDraw.Draw(picture)
    for down, row in enumerate(rows):
        middle = (gap + (height + gap) * down + height / 2) * scale
        pen.text((margin - scale - 2, middle), row.title, INK, font, anchor="rm")
    return picture


def data_uri(kind: str, content: bytes) -> str:
    """A picture of this media type, embedded in a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
