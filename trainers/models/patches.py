"""How images are cut into patches. Needs no torch: plans ask before there is any."""

from collections.abc import Sequence


def patch_grid(image_shape: Sequence[int], patch: int) -> tuple[int, int]:
    """(rows, columns) of patches of an image [C, H, W]. Raises ValueError when they do not tile it."""
    _, height, width = image_shape
    if height % patch or width % patch:
        raise ValueError(f"patch = {patch} does not divide the image {height} x {width}; choose a divisor")
    return height // patch, width // patch
