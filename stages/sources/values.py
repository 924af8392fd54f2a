"""What the values of float images are: those that are not finite, and their range, told in a sentence."""

from __future__ import annotations

import math

import numpy as np


def clear_nonfinite(values: np.ndarray) -> dict[int, str]:
    """Zeroes, in place, the rows of [n, C, H, W] that hold NaN or infinity; their reasons by row."""
    if values.dtype == np.uint8:
        return {}
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3))):
        bad = values[row].size - np.isfinite(values[row]).sum()
        reasons[int(row)] = f"{bad} of {values[row].size} values are not finite"
        values[row] = 0
    return reasons


class FloatRange:
    """Lowest, highest and root mean square of all values that it is shown."""

    def __init__(self) -> None:
        self.low, self.high, self.power, self.count = math.inf, -math.inf, 0.0, 0

    def add(self, values: np.ndarray) -> None:
        if values.dtype == np.uint8 or not values.size:
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.power += float(np.square(values, dtype=np.float64).sum())
        self.count += values.size

    def told(self, dtype: str) -> str:
        """That floats are taken as latents, and what to do if they are pixels."""
        size = math.sqrt(self.power / max(self.count, 1))
        text = (
            f"{dtype} from {self.low:.4g} to {self.high:.4g}, root mean square {size:.4g}, taken as latents, as they "
            "are; a teacher wants about 1"
        )
        for low, high, pixels in ((0, 1, "data * 255"), (-1, 1, "(data + 1) * 127.5"), (0, 255, "data")):
            if low <= self.low and self.high <= high:
                rounded = "np.rint(data)" if pixels == "data" else f"np.rint({pixels})"
                return f"{text}. If they are pixels, save {rounded}.astype(np.uint8)"
        return text
