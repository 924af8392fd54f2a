"""Sizes that must fit each other, told as ValueError. No torch here: a config is checked before anything is made."""

from __future__ import annotations

from collections.abc import Sequence

UNET_GROUP = 8  # channels of a norm's group


def check_patch(image_shape: Sequence[int], patch: int) -> None:
    """Patches tile the images [C, H, W]."""
    _, height, width = image_shape
    if height % patch or width % patch:
        raise ValueError(f"patch = {patch} does not divide the image {height} x {width}; choose a divisor")


def check_channels(channels: int, head_size: int) -> None:
    """A flow's channels are whole heads."""
    if channels % head_size:
        raise ValueError(f"channels = {channels} is not a multiple of head_size = {head_size}")


def check_width(width: int, head_size: int) -> None:
    """A transformer's tokens are whole heads, and four sines and cosines of their place."""
    if width % head_size or width % 4:
        raise ValueError(f"width = {width} is not a multiple of head_size = {head_size} and of 4")


def check_unet_width(width: int) -> None:
    """A U-Net's channels are whole groups."""
    if width < 1 or width % UNET_GROUP:
        raise ValueError(
            f"width = {width} of a U-Net is not a multiple of {UNET_GROUP}, the channels of a norm's group"
        )


def check_sides(image_shape: Sequence[int]) -> None:
    """The classifier halves an image three times."""
    if min(image_shape[1:]) < 8:
        raise ValueError(f"images are {'x'.join(map(str, image_shape))}; FeatureNet needs sides of 8 pixels or more")
