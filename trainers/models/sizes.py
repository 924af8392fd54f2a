"""Checks sizes that must fit each other; they raise ValueError. No torch here, so that configs can be checked fast."""

from __future__ import annotations

from collections.abc import Sequence

UNET_GROUP = 8  # channels in a group of a norm


def check_patch(image_shape: Sequence[int], patch: int) -> None:
    """Patches must tile the images [C, H, W]."""
    _, height, width = image_shape
    if height % patch or width % patch:
        raise ValueError(f"patch = {patch} does not divide the image {height} x {width}; choose a divisor")


def check_channels(channels: int, head_size: int) -> None:
    """The channels of a flow must be whole heads."""
    if channels % head_size:
        raise ValueError(f"channels = {channels} is not a multiple of head_size = {head_size}")


def check_width(width: int, head_size: int) -> None:
    """The width of a transformer must be whole heads, and a multiple of 4 for the sines and cosines of positions."""
    if width % head_size or width % 4:
        raise ValueError(f"width = {width} is not a multiple of head_size = {head_size} and of 4")


def check_unet_width(width: int) -> None:
    """The channels of a U-Net must be whole groups."""
    if width < 1 or width % UNET_GROUP:
        raise ValueError(
            f"width = {width} of a U-Net is not a multiple of {UNET_GROUP}, the channels of a norm's group"
        )


def check_sides(image_shape: Sequence[int]) -> None:
    """The classifier halves the sides of an image three times."""
    if min(image_shape[1:]) < 8:
        raise ValueError(f"images are {'x'.join(map(str, image_shape))}; FeatureNet needs sides of 8 pixels or more")
