"""The meaning of the axes: images are [N, C, H, W] unless `data.axes` says otherwise. Doubtful cases are refused."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from nfm.stages.base import StageError, Unfit
from nfm.storage.errors import by

Axes = Literal["nchw", "nhwc", "nhw"]
CHANNELS = (1, 3, 4)  # grey, colour, colour with alpha or a common latent


def image_shape(shape: tuple[int, ...], axes: Axes | None, where: str) -> tuple[int, int, int]:
    """[C, H, W] of the images in an array of this shape. Raises StageError if it is not an array of images."""
    if len(shape) == 4 and axes != "nhw":
        found = (shape[3], shape[1], shape[2]) if axes == "nhwc" else shape[1:]
    elif len(shape) == 3 and axes == "nhw":
        found = (1, *shape[1:])
    elif len(shape) == 2 and axes != "nhw" and (side := math.isqrt(shape[1] // 3)) and 3 * side * side == shape[1]:
        found = (3, side, side)
    else:
        error = StageError if axes is None and len(shape) != 3 else Unfit
        raise error(f"{where}, expected [N, C, H, W], or uint8 [N, 3 * side * side]; {_remedy(shape, axes)}")
    if min(found) < 1:
        raise StageError(f"{where}: images of {by(found)} hold nothing")
    return found[0], found[1], found[2]


def _remedy(shape: tuple[int, ...], axes: Axes | None) -> str:
    if axes is not None and len(shape) != len(axes) and len(shape) in (3, 4):
        return f'data.axes = "{axes}" is of {len(axes)} axes: leave it out or set it to what these {len(shape)} are'
    if len(shape) == 3:
        return 'of grey images [N, H, W], set data.axes = "nhw"'
    if len(shape) == 2:
        return "reshape flat images, grey ones to [N, 1, H, W]"
    return "reshape it and save it again"


def check_axes(shape: tuple[int, ...], axes: Axes | None, where: str) -> str | None:
    """Refuses an array whose axes look like [N, H, W, C], unless the config states the axes.

    Returns a remark if both readings are equally likely, or if the stated one looks wrong. A usual number of channels
    makes a reading more likely, and so do square images.
    """
    if len(shape) != 4 or shape[1] == shape[2] == shape[3] == 1:
        return None
    first, last = (shape[1], shape[2], shape[3]), (shape[3], shape[1], shape[2])
    if axes is not None:
        taken, other = (last, first) if axes == "nhwc" else (first, last)
        if not _looks_like(other, rather_than=taken):
            return None
        swapped = "nchw" if axes == "nhwc" else "nhwc"
        return (
            f'{where}: taken as {_told(*taken)}, as data.axes = "{axes}" says; with "{swapped}" it holds '
            f"{_told(*other)}"
        )
    if _looks_like(last, rather_than=first):
        raise Unfit(
            f"{where}: channels first, which is the rule here, it holds {_told(*first)}; channels last, "
            f'{_told(*last)}. Set data.axes = "nhwc" if its channels are last (or save it with '
            '.transpose(0, 3, 1, 2)), data.axes = "nchw" if they are first'
        )
    if last[0] in CHANNELS and last[1] == last[2] > 1:
        return f'{where}: taken as [N, C, H, W]; if its channels are last, set data.axes = "nhwc"'
    return None


def _looks_like(reading: tuple[int, int, int], rather_than: tuple[int, int, int]) -> bool:
    """Whether the first of two readings as [C, H, W] is likely and the other is not."""
    usual, square = reading[0] in CHANNELS, reading[1] == reading[2] > 1
    other_usual, other_square = rather_than[0] in CHANNELS, rather_than[1] == rather_than[2]
    return (usual and not (other_usual and other_square)) or (square and not other_square)


def _told(channels: int, height: int, width: int) -> str:
    return f"images of {channels} channel{'s' if channels != 1 else ''} and {height} x {width}"


def channels_first(values: np.ndarray, shape: tuple[int, int, int], axes: Axes | None) -> np.ndarray:
    """The rows of an array as [n, C, H, W]."""
    channels, height, width = shape
    if axes == "nhwc":
        return values.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
    return values.reshape(-1, channels, height, width)
