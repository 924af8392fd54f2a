"""What a reader reads from, what it yields, and the memory it fills in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nfm.storage.convert import to_float32
from nfm.storage.device import Upload
from nfm.storage.order import Rows

Arrays = dict[str, npt.NDArray[Any]]


class Source(Protocol):
    """What a reader reads from: a split of a dataset, or the draws of a pair store."""

    @property
    def order_key(self) -> str: ...

    @property
    def content_digest(self) -> str: ...

    @property
    def generation(self) -> int | None: ...

    @property
    def value_range(self) -> tuple[float, float]: ...

    def __len__(self) -> int: ...

    def draw(self, epoch: int) -> int:
        """The draw that this epoch reads."""
        ...

    def empty(self, records: int) -> Arrays:
        """Buffers for that many records, in the stored dtypes: image, and noise and label where there are
        any.
        """
        ...

    def gather(self, draw: int, rows: Rows, out: Arrays) -> Any:
        """Fills `out` with the records at these rows of a draw."""
        ...


@dataclass(frozen=True)
class Batch:
    """The records of one rank: image and noise float32 [B, *shape], label (-1: none) and slot int64 [B].

    numpy arrays, or torch tensors where the reader was given a device; `noise` is None for a dataset.
    """

    image: Any
    noise: Any
    label: Any
    slot: Any
    draw: int
    epoch: int

    def __len__(self) -> int:
        return len(self.image)


class Buffers:
    """Memory for one batch: what the files hold, and what the consumer sees."""

    def __init__(self, source: Source, records: int, upload: Upload | None) -> None:
        self._stored = source.empty(records)
        self._other = {"slot": np.empty(records, np.int64)}
        if "label" not in self._stored:
            self._other["label"] = np.full(records, -1, np.int64)
        self._float32: Arrays = {}
        self._upload = upload
        if upload is None or upload.on_host:
            for name, array in self._stored.items():
                if array.dtype in (np.uint8, np.float16):
                    self._float32[name] = np.empty(array.shape, np.float32)
        else:
            self._stored, self._other = upload.buffers(self._stored), upload.buffers(self._other)

    def fill(self, source: Source, draw: int, rows: Rows) -> dict[str, Any]:
        """Gathers and converts the records at `rows` of a draw; arrays or tensors by field name."""
        count = len(rows)
        stored = {name: array[:count] for name, array in self._stored.items()}
        source.gather(draw, rows, stored)
        self._other["slot"][:count] = rows
        fields = stored | {name: array[:count] for name, array in self._other.items()}
        if self._upload is not None and not self._upload.on_host:
            return self._upload(fields, source.value_range)
        for name, buffer in self._float32.items():
            fields[name] = to_float32(stored[name], source.value_range, out=buffer[:count])
        return fields if self._upload is None else self._upload.share(fields)
