"""The batches that a reader yields, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import StorageError, by
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.format.convert import linear
from nfm.storage.format.fields import OF_BATCHES
from nfm.storage.reading.device import Upload
from nfm.storage.reading.pool import Pool, empty
from nfm.storage.reading.soften import Softener
from nfm.storage.reading.stream import Arrays, Records, Source


@dataclass(frozen=True)
class Batch:
    """The records of one rank: `image` and `noise` float32 [B, *shape], `label`, `slot`, `draw`, `store` int64 [B].

    They are numpy arrays, or torch tensors if the reader was given a device. With `raw=True` they have the dtypes in
    which they are stored. `noise` is None for a dataset of images, `label` is -1 if there is none, and `store` is the
    number of the mixture's member (0 for a single store). `fields` holds the requested row-scoped fields, [B, *shape]
    by name. `place` is a numpy array, int64 [B]: the position of each record in the batch of all ranks, which is the
    same for any number of ranks. You may keep a batch and write into it: its memory is reused only when nothing refers
    to it, or to a view or tensor of it.
    """

    image: Any
    noise: Any
    label: Any
    slot: Any
    draw: Any
    store: Any
    epoch: int
    fields: dict[str, Any]
    place: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image)


class Assembly:
    """Makes a batch: gathers it from its sources and joins row-scoped fields.

    On the CPU its numbers become float32 while they are gathered. Other devices get them as stored and convert them,
    unless the members of a mixture store a field in different types, or the noise is softened: that runs on the CPU for
    every device, so that its bits are always the same. A batch holds at most `records` records.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        records: int,
        fields: Sequence[str],
        raw: bool,
        upload: Upload | None,
        soften: Softener | None = None,
    ) -> None:
        self._sources = sources
        self._upload = upload
        self._soften = soften
        self._own = [source.empty(0) for source in sources]
        self._joined = [{name: source.row_field(name) for name in fields} for source in sources]
        self._fields = tuple(fields)
        self._common = _common(sources, self._own, raw)
        if soften is not None:
            if raw:
                raise WrongArgument("soften", "needs float32 noise, raw=True leaves it as stored: pass one of the two")
            if "noise" not in self._common:
                raise WrongArgument("soften", "mixes fresh noise into a store's, and a dataset has none: leave it out")
            self._common["noise"] = np.empty(self._common["noise"].shape, np.float32)
        for name in fields:
            if name in OF_BATCHES:
                raise StorageError(f"field {name!r} has the name of a batch's own array: store it under another one")
            kinds = {(str(joined[name].dtype), joined[name].shape) for joined in self._joined}
            if len(kinds) > 1:
                raise StorageError(f"field {name!r} differs between the stores: {sorted(kinds)}; leave it out")
            first = self._joined[0][name]
            self._common[name] = np.empty((0, *first.shape), first.dtype)
        self._widened = () if raw else tuple(name for name, array in self._common.items() if _widens(name, array))
        if upload is None or upload.on_host:
            for name in self._widened:
                self._common[name] = np.empty(self._common[name].shape, np.float32)
        allocate = empty if upload is None else upload.empty
        self._pools = {
            name: Pool((records, *array.shape[1:]), array.dtype, allocate) for name, array in self._common.items()
        }

    @property
    def bytes_per_batch(self) -> int:
        """The memory of a full batch on the host."""
        return sum(pool.bytes for pool in self._pools.values())

    @property
    def allocated(self) -> dict[str, int]:
        """The number of arrays allocated so far, by field."""
        return {name: pool.made for name, pool in self._pools.items()}

    def clear(self) -> None:
        """Frees memory that no batch uses."""
        for pool in self._pools.values():
            pool.clear()

    def fill(self, records: Records) -> dict[str, Any]:
        """Gathers the records. Returns arrays or tensors by name, which the caller owns."""
        arrays = {name: pool.lend(len(records.slot)) for name, pool in self._pools.items()}
        arrays["slot"][:], arrays["draw"][:], arrays["store"][:] = records.slot, records.draw, records.store
        for store, draw, where in records.runs():
            self._gather(store, draw, records.slot[where], {name: array[where] for name, array in arrays.items()})
        if self._soften is not None:
            self._soften(arrays["noise"], records)
        if self._upload is None:
            return arrays
        if self._upload.on_host:
            return self._upload.share(arrays)
        return self._upload(arrays, {n: _scale(n, arrays[n].dtype, self._sources[0]) for n in self._widened})

    def batch(self, arrays: dict[str, Any], epoch: int, place: npt.NDArray[np.int64]) -> Batch:
        """The batch made of the result of `fill`."""
        core = {name: arrays.get(name) for name in OF_BATCHES}
        return Batch(**core, epoch=epoch, fields={name: arrays[name] for name in self._fields}, place=place)

    def _gather(self, store: int, draw: int, slots: npt.NDArray[np.int64], out: Arrays) -> None:
        self._sources[store].gather(draw, slots, {name: out[name] for name in self._own[store]})
        if "label" not in self._own[store]:
            out["label"][:] = -1
        for name, joined in self._joined[store].items():
            if joined.dtype == out[name].dtype:
                joined.gather(draw, slots, out[name])
            else:
                out[name][...] = joined.gather(draw, slots, np.empty((len(slots), *joined.shape), joined.dtype))


def _scale(name: str, dtype: np.dtype[Any], source: Source) -> tuple[float, float]:
    """(a, b) such that a stored v of this field means a * v + b."""
    return linear(dtype, source.value_range, source.noise_step if name == "noise" else None)


def _widens(name: str, array: npt.NDArray[Any]) -> bool:
    """Whether a field is float32 in a batch but has another type in the store."""
    return array.dtype == np.float16 or (name in ("image", "noise") and array.dtype != np.float32)


def _common(sources: Sequence[Source], own: Sequence[Arrays], raw: bool) -> Arrays:
    """Empty arrays by name, in the types in which a batch is gathered."""
    common = {name: np.empty(0, np.int64) for name in ("label", "slot", "draw", "store")}
    for name in ("image", "noise"):
        found = [arrays[name] for arrays in own if name in arrays]
        if not found:
            continue
        if len(found) < len(own) or len({array.shape for array in found}) > 1:
            shapes = [by(arrays[name].shape[1:]) if name in arrays else "none" for arrays in own]
            raise StorageError(
                f"{name}: the stores differ in shape, {', '.join(shapes)}; mix stores of one kind of image"
            )
        ranges = {source.value_range for source in sources}
        if name == "image" and len(ranges) > 1 and any(array.dtype == np.uint8 for array in found):
            raise StorageError(f"image: the stores' value ranges differ, {sorted(ranges)}; mix stores of one range")
        kinds = {array.dtype.name for array in found}
        steps = {source.noise_step for source in sources} if name == "noise" else {None}
        if len(kinds) == len(steps) == 1:
            common[name] = found[0]
        elif raw:
            unlike = ", ".join(sorted(kinds)) if len(kinds) > 1 else f"{kinds.pop()} with other steps"
            raise StorageError(f"{name} is stored as {unlike} by the stores: read without raw")
        else:
            common[name] = np.empty(found[0].shape, np.float32)
    return common
