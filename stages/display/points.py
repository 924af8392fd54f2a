"""Draws images of two values as points of a plane. A file needs only Pillow, a panel needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FIRST, SECOND = "first coordinate", "second coordinate"
INK, LINE, BLUE = "#414b58", "#dde2e9", "#2566d8"
SIDE, MARGIN, DOT = 480, 64, 2  # pixels


def are_points(shape: Sequence[int]) -> bool:
    """Whether an image of this shape has two values."""
    return math.prod(shape) == 2


def coordinates(images: np.ndarray) -> np.ndarray:
    """The points [n, 2] of images of two values, without those that are not finite."""
    flat = np.asarray(images, np.float32).reshape(-1, 2)
    return flat[np.isfinite(flat).all(axis=1)]


def reach(*sets: np.ndarray) -> float:
    """Half the side of a square around 0 that includes all these points, a whole number."""
    furthest = max((float(np.abs(points).max()) for points in sets if len(points)), default=0.0)
    return float(max(math.ceil(1.05 * furthest), 1))


def scatter(images: np.ndarray) -> Image:
    """The points as a picture with axes and ticks on white, with the same scale on both axes."""
    from PIL import Image, ImageDraw, ImageFont

    points = coordinates(images)
    far = reach(points)
    picture = Image.new("RGB", (SIDE + MARGIN + 24, SIDE + MARGIN + 32), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    left, top = MARGIN, 32
    for value in np.linspace(-far, far, 5):
        along = (value + far) / (2 * far) * SIDE
        pen.line([(left + along, top), (left + along, top + SIDE)], fill=LINE)
        pen.line([(left, top + SIDE - along), (left + SIDE, top + SIDE - along)], fill=LINE)
        pen.text((left + along, top + SIDE + 6), f"{value:g}", INK, font, anchor="mt")
        pen.text((left - 6, top + SIDE - along), f"{value:g}", INK, font, anchor="rm")
    pen.rectangle([left, top, left + SIDE, top + SIDE], outline=INK)
    for x, y in (points + far) / (2 * far) * SIDE:
        pen.ellipse([left + x - DOT, top + SIDE - y - DOT, left + x + DOT, top + SIDE - y + DOT], fill=BLUE)
    lost = len(images) - len(points)
    told = f"{len(points):,} points" + (f"; {lost:,} more are not finite" if lost else "")
    pen.text((left, top - 8), told, INK, font, anchor="ls")
    pen.text((left + SIDE / 2, top + SIDE + 42), FIRST, INK, font, anchor="mm")
    _upright(picture, SECOND, (14, top + SIDE // 2), font)
    return picture


def panel(axes: Any, sets: Mapping[str, np.ndarray], colours: Sequence[str]) -> None:
    """Draws points [n, 2] by name into matplotlib axes, with the same scale on both axes and no legend."""
    for (name, points), colour in zip(sets.items(), colours):
        axes.scatter(*points.T, s=24 if len(points) <= 100 else 6, color=colour, alpha=0.7, lw=0, label=name)
    far = reach(*sets.values())
    axes.set(xlabel=FIRST, ylabel=SECOND, xlim=(-far, far), ylim=(-far, far), aspect="equal")


def _upright(picture: Image, text: str, middle: tuple[int, int], font: Any) -> None:
    from PIL import Image, ImageDraw

    _, _, width, height = font.getbbox(text)
    word = Image.new("RGB", (int(width) + 2, int(height) + 4), "white")
    ImageDraw.Draw(word).text((1, 1), text, INK, font)
    turned = word.rotate(90, expand=True)
    picture.paste(turned, (middle[0] - turned.width // 2, middle[1] - turned.height // 2))
