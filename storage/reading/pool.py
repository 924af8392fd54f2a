"""Memory for batches. It is reused when no batch, array, view or tensor refers to it any more."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_Memory = tuple[Array, dict[str, Any]]  # and its `__array_interface__`, which takes long to make
_SPARE = 8  # arrays kept for later use: a consumer may release so many batches at once without a new allocation later
_HUGE_PAGE = 2 << 20  # bytes


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """As np.empty, but a large array begins at a huge page. numpy requests huge pages, and they fill faster."""
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE:
        return np.empty(shape, dtype)
    memory = np.empty(size + _HUGE_PAGE, np.uint8)
    return memory[-memory.ctypes.data % _HUGE_PAGE :][:size].view(dtype).reshape(shape)


class _Loan:
    """The base of a lent array and of all its views and tensors. It is deleted with the last of them.

    It is not an array. Otherwise numpy would let views refer to the memory directly.
    """

    __slots__ = ("__array_interface__", "_memory", "_spare")

    def __init__(self, memory: _Memory, spare: deque[_Memory]) -> None:
        self.__array_interface__ = memory[1]
        self._memory = memory
        self._spare = weakref.ref(spare)

    def __del__(self) -> None:
        """May run in any thread at any time. A deque is safe for this without a lock."""
        spare = self._spare()
        if spare is not None:
            spare.append(self._memory)


class Pool:
    """Arrays of up to shape[0] records, of `bytes` each, that are returned automatically. `made` counts them."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        allocate: Callable[[tuple[int, ...], np.dtype[Any]], Array] = empty,
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._allocate = allocate
        self.bytes = math.prod(shape) * dtype.itemsize
        self.made = 0
        self.clear()

    def lend(self, records: int) -> Array:
        """An array of that many records. No one else gets any part of it until its last user releases it."""
        try:
            memory = self._spare.pop()
        except IndexError:
            array = self._allocate(self._shape, self._dtype)
            memory = array, array.__array_interface__
            self.made += 1
        return np.asarray(_Loan(memory, self._spare))[:records]

    def clear(self) -> None:
        """Frees the memory. Lent arrays are freed with their last user and do not return."""
        self._spare: deque[_Memory] = deque(maxlen=_SPARE)
