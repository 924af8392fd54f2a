"""Memory of batches, used again once nobody refers to it: a batch, an array, a view or a tensor made of one."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_SPARE = 8  # arrays kept for later use: a consumer may let go of as many batches at once and none is allocated again
_HUGE_PAGE = 2 << 20  # bytes


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """As np.empty; a large array begins where a huge page does: numpy asks the kernel for these, they fill faster."""
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE:
        return np.empty(shape, dtype)
    memory = np.empty(size + _HUGE_PAGE, np.uint8)
    return memory[-memory.ctypes.data % _HUGE_PAGE :][:size].view(dtype).reshape(shape)


class _Loan:
    """What a lent array has as its base, as do all views and tensors of it: goes with the last of them.

    It is no array, or numpy would make views refer to the memory itself and pass it by.
    """

    __slots__ = ("__array_interface__", "_memory", "_spare")

    def __init__(self, memory: Array, spare: deque[Array]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._spare = weakref.ref(spare)

    def __del__(self) -> None:
        """In any thread, at any moment: a deque takes this without a lock."""
        spare = self._spare()
        if spare is not None:
            spare.append(self._memory)


class Pool:
    """Arrays of up to shape[0] records that come back by themselves; `made` counts those that were allocated."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        allocate: Callable[[tuple[int, ...], np.dtype[Any]], Array] = empty,
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._allocate = allocate
        self.made = 0
        self.clear()

    def lend(self, records: int) -> Array:
        """An array of that many records, of which nobody else has any part until its last holder lets go."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = self._allocate(self._shape, self._dtype)
            self.made += 1
        return np.asarray(_Loan(memory, self._spare))[:records]

    def clear(self) -> None:
        """Lets go of the memory: what is lent goes with its holders, and does not come back."""
        self._spare: deque[Array] = deque(maxlen=_SPARE)
