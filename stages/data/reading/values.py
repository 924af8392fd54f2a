"""Checks the values of images: which are not finite, and whether their range is unusual."""

from __future__ import annotations

import math

import numpy as np

DARK = 64  # images whose highest pixel is below this are reported as dark


def clear_nonfinite(values: np.ndarray) -> dict[int, str]:
    """Sets the rows of [n, C, H, W] with NaN or infinity to zero, in place. Returns the reason for each such row."""
    if values.dtype == np.uint8:
        return {}
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3))):
        bad = values[row].size - np.isfinite(values[row]).sum()
        beyond = values.dtype == np.float16 and np.isinf(values[row]).any()
        remedy = "; float16 ends at 65,504: save float32 if they were larger" if beyond else ""
        reasons[int(row)] = f"{bad} of {values[row].size} values are not finite{remedy}"
        values[row] = 0
    return reasons


class Values:
    """The lowest value, the highest value and the root mean square of all images."""

    def __init__(self) -> None:
        self.low, self.high, self.power, self.count = math.inf, -math.inf, 0.0, 0

    def add(self, images: np.ndarray) -> None:
        if not images.size:
            return
        self.low, self.high = min(self.low, float(images.min())), max(self.high, float(images.max()))
        if images.dtype != np.uint8:
            self.power += float(np.square(images, dtype=np.float64).sum())
            self.count += images.size

    def remark(self, dtype: str) -> str | None:
        """A remark on unusual values: pixels that are all dark, bits or fractions stored as bytes, or floats as
        latents.
        """
        if dtype == "uint8":
            told = f"uint8 from {self.low:g} to {self.high:g}, where 255 is white: scale the values if they mean more"
            return told if 0 <= self.high < DARK else None
        if not self.count:
            return None
        size = math.sqrt(self.power / self.count)
        text = (
            f"{dtype} from {self.low:.4g} to {self.high:.4g}, root mean square {size:.4g}, taken as latents, as they "
            "are; a teacher wants about 1"
        )
        for low, high, pixels in ((0, 1, "data * 255"), (-1, 1, "(data + 1) * 127.5"), (0, 255, "data")):
            if low <= self.low and self.high <= high:
                return f"{text}. If they are pixels, save np.rint({pixels}).astype(np.uint8)"
        return text
