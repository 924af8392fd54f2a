"""Gathers records, and converts them to float32, in one pass, with loops that numba compiles. They are optional.

numpy and torch copy the stored records and then convert the copy, in up to three passes. A compiled loop reads the
stored numbers where they lie and writes them where they belong, with the same bits, and other threads run meanwhile.

To import numba and to compile takes seconds. So a thread does it, once a process has written so many bytes that it
pays; until then, and where numba is not installed or fails, numpy and torch do the work.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.format.convert import FLOAT16_BIAS, FLOAT16_INFINITY, SIGN_EXPONENT_MANTISSA

WORTH = 4 << 30  # bytes written by one kind of loop, from which on compiling it is worth its seconds
KINDS = ("bytes", "uint8", "int8", "int16", "float16")

Array = npt.NDArray[Any]
Loop = Callable[[Array, Array, float, float], None]
_log = logging.getLogger("nfm.storage")


class Loops:
    """The compiled loops of a process."""

    def __init__(self, worth: int = WORTH) -> None:
        self._worth = worth
        self._written: Counter[str] = Counter()
        self._threads: dict[str, threading.Thread] = {}
        self._made: dict[str, Loop] = {}
        self.on = True

    def loop(self, kind: str, size: int) -> Loop | None:
        """The loop for stored numbers of this kind, of which `size` bytes will be written; None while there is none.

        `loop(starts, out, a, b)` fills out [n, size], float32, with a v + b, rounded twice, of the `size` numbers v at
        each of the addresses `starts` [n], int64. Those of float16 keep their values. `bytes` are copied into uint8.
        """
        if not self.on or kind not in KINDS:
            return None
        if kind in self._made:
            return self._made[kind]
        self._written[kind] += size
        if self._written[kind] >= self._worth and kind not in self._threads:
            # Not a daemon: a process that ends while LLVM works in a thread may crash.
            self._threads[kind] = threading.Thread(target=self.make, args=(kind,), name="nfm-compile")
            self._threads[kind].start()
        return None

    def make(self, kind: str) -> None:
        """Compiles this loop. Without numba there will be no loops, and if it fails neither, which is logged."""
        try:
            with _compiling:
                if kind not in self._made:
                    loop = _compiled(kind)
                    _prove(loop, kind)
                    self._made[kind] = loop
        except (Exception, SystemExit) as error:  # whatever is wrong with numba, reading goes on without it
            self.on = False
            if not (isinstance(error, ModuleNotFoundError) and error.name == "numba"):
                _log.warning("numba cannot compile the reader's loops, numpy and torch do their work: %s", error)


_compiling = threading.RLock()  # a fork waits for it: numba's own lock would stay locked in the child
os.register_at_fork(before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release)
loops = Loops()


def _prove(loop: Loop, kind: str) -> None:
    """Raises ArithmeticError unless the loop makes of every number what numpy makes of it.

    NUMBA_DISABLE_JIT, for one, gives loops that cannot be called.
    """
    dtype = np.dtype("uint8" if kind == "bytes" else kind)
    stored: Array = np.arange(256**dtype.itemsize).astype(f"uint{8 * dtype.itemsize}").view(dtype)
    a, b = (np.float32(1), np.float32(0)) if kind in ("bytes", "float16") else (np.float32(0.1), np.float32(-0.7))
    with np.errstate(invalid="ignore"):  # some are NaN
        expected = stored if kind == "bytes" else stored.astype(np.float32) * a + b
    out = np.zeros((1, len(stored)), expected.dtype)
    loop(np.array([stored.ctypes.data]), out, float(a), float(b))
    if not np.array_equal(out[0], expected, equal_nan=True):
        raise ArithmeticError(f"its loop over {kind} makes other numbers than numpy")


def _compiled(kind: str) -> Loop:
    """The loop of this kind. Functions that numba compiles see no others but these, so they stand in here."""
    import numba
    from numba import carray, float32, int32, int64, njit, types, uint8, void
    from numba.extending import intrinsic as typed_intrinsic

    intrinsic: Any = typed_intrinsic  # compiled code calls it without the first argument, which mypy does not know
    number = numba.from_dtype(np.dtype({"bytes": "uint8", "float16": "int16"}.get(kind, kind)))

    @intrinsic
    def pointer(_: Any, address: Any) -> Any:
        """An address as a pointer to numbers."""
        to = types.CPointer(number)
        return to(int64), lambda at, builder, __, args: builder.inttoptr(args[0], at.get_value_type(to))

    @intrinsic
    def as_float(_: Any, bits: Any) -> Any:
        """The float32 with these bits."""
        return float32(int32), lambda context, builder, __, args: builder.bitcast(
            args[0], context.get_value_type(float32)
        )

    def copied(stored: Array, out: Array, a: Any, b: Any) -> None:
        for at in range(len(out)):
            out[at] = stored[at]

    def scaled(stored: Array, out: Array, a: Any, b: Any) -> None:
        for at in range(len(out)):
            out[at] = np.float32(stored[at]) * a + b

    def widened(stored: Array, out: Array, a: Any, b: Any) -> None:
        """The bits of float16, moved to their places in float32, and times 2^112: see `convert._from_float16`.

        Infinities and NaNs, which that does not reach, get the highest exponent in a loop of their own.
        """
        highest = np.int32(0)
        for at in range(len(out)):
            bits = np.int32(stored[at])
            highest = max(highest, bits & FLOAT16_INFINITY)
            out[at] = as_float((bits << np.int32(13)) & SIGN_EXPONENT_MANTISSA) * FLOAT16_BIAS
        if highest == FLOAT16_INFINITY:
            for at in range(len(out)):
                bits = np.int32(stored[at])
                if bits & FLOAT16_INFINITY == FLOAT16_INFINITY:
                    places = (bits << np.int32(13)) & SIGN_EXPONENT_MANTISSA
                    out[at] = as_float(places | np.int32(0x7F800000))

    convert = njit({"bytes": copied, "float16": widened}.get(kind, scaled), nogil=True)

    def loop(starts: Array, out: Array, a: Any, b: Any) -> None:
        for record in range(len(starts)):
            convert(carray(pointer(starts[record]), (out.shape[1],)), out[record], a, b)

    written = uint8 if kind == "bytes" else float32
    made: Loop = njit(void(int64[::1], written[:, ::1], float32, float32), nogil=True)(loop)
    return made
