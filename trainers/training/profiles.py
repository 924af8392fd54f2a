"""The profiles of moving averages that are a power of time, and combinations of them. No torch here.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, section 3 and
appendix C. The average at t examples weighs the weights at s examples by (gamma + 1) s^gamma / t^(gamma + 1). So its
width is the same part of a training of any length, and the first weights are forgotten.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDEST = 0.28  # of a relative width; gamma = 0, the mean of all, has 0.289


@functools.cache
def gamma_of(width: float) -> float:
    """The exponent of a relative width, the square root of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    It is the largest root of a cubic (algorithm 2). Raises ValueError for a width outside (0, 0.28].
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"relative width {width}: not in (0, {WIDEST}], for example 0.05")
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Profile(NamedTuple):
    """What an average is of: taken at `seen` examples, with a relative width."""

    seen: float
    width: float


def combination(known: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """The weights, of sum 1, with which `known` averages make up `wanted`, and the error of the profile that they make.

    Least squares of the profiles (algorithm 3). The error is relative: the norm of the difference over that of the
    wanted profile.
    """
    products = np.array([[_product(one, other) for other in known] for one in known])
    with_wanted = np.array([_product(one, wanted) for one in known])
    weights = np.linalg.lstsq(products, with_wanted, rcond=1e-13)[0]
    weights /= weights.sum()
    norm = _product(wanted, wanted)
    error = weights @ products @ weights - 2 * weights @ with_wanted + norm
    return [float(weight) for weight in weights], math.sqrt(max(error, 0.0) / norm)


def _product(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles (equation 151)."""
    early, late = sorted((one, other))
    first, second = gamma_of(early.width), gamma_of(late.width)
    return (first + 1) * (second + 1) * (early.seen / late.seen) ** second / ((first + second + 1) * late.seen)
