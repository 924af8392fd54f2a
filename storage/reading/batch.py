"""The batches that a reader yields, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import StorageError, by
from nfm.storage.errors.arguments import WrongArgument
from nfm.storage.format.convert import scale_of, to_float32
from nfm.storage.reading.device import Upload
from nfm.storage.reading.pool import Pool, empty
from nfm.storage.reading.soften import Softener
from nfm.storage.reading.stream import Arrays, Records, Source

_CORE = ("image", "noise", "label", "slot", "draw", "store")


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
    """Makes a batch: gathers it from its sources, joins row-scoped fields, and converts it once.

    If the members of a mixture store a field in different types, each is gathered separately and converted to float32.
    So is noise that is softened; softening runs on the CPU for every device, so that its bits are always the same. A
    batch holds at most `records` records.
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
            if name in _CORE:
                raise StorageError(f"field {name!r} has the name of a batch's own array: store it under another one")
            kinds = {(str(joined[name].dtype), joined[name].shape) for joined in self._joined}
            if len(kinds) > 1:
                raise StorageError(f"field {name!r} differs between the stores: {sorted(kinds)}; leave it out")
            first = self._joined[0][name]
            self._common[name] = np.empty((0, *first.shape), first.dtype)
        self._widened = () if raw else tuple(name for name, array in self._common.items() if _widens(name, array))
        self._scratch: dict[tuple[int, str], npt.NDArray[Any]] = {}
        allocate = empty if upload is None else upload.empty
        self._stored = {
            name: Pool((records, *array.shape[1:]), array.dtype, allocate) for name, array in self._common.items()
        }
        self._float32 = {
            name: Pool((records, *self._common[name].shape[1:]), np.dtype(np.float32)) for name in self._widened
        }

    @property
    def allocated(self) -> dict[str, int]:
        """The number of arrays allocated so far, by field, with those before and after a conversion."""
        return {
            name: max(pool.made, self._float32[name].made if name in self._float32 else 0)
            for name, pool in self._stored.items()
        }

    def clear(self) -> None:
        """Frees memory that no batch uses."""
        for pool in (*self._stored.values(), *self._float32.values()):
            pool.clear()

    def fill(self, records: Records) -> dict[str, Any]:
        """Gathers and converts the records. Returns arrays or tensors by name, which the caller owns."""
        count = len(records.slot)
        arrays = {name: pool.lend(count) for name, pool in self._stored.items()}
        arrays["slot"][:], arrays["draw"][:], arrays["store"][:] = records.slot, records.draw, records.store
        for store, draw, where in records.runs():
            self._gather(store, draw, records.slot[where], {name: array[where] for name, array in arrays.items()})
        if self._soften is not None:
            self._soften(arrays["noise"], records)
        source = self._sources[0]
        if self._upload is not None and not self._upload.on_host:
            scales = {name: _scale(name, arrays[name].dtype, source) for name in self._widened}
            return self._upload(arrays, scales)
        for name in self._widened:
            out = self._float32[name].lend(count)
            step = source.noise_step if name == "noise" else None
            arrays[name] = to_float32(arrays[name], source.value_range, out, step, torch=self._upload is not None)
        return arrays if self._upload is None else self._upload.share(arrays)

    def batch(self, arrays: dict[str, Any], epoch: int, place: npt.NDArray[np.int64]) -> Batch:
        """The batch made of the result of `fill`."""
        core = {name: arrays.get(name) for name in _CORE}
        return Batch(**core, epoch=epoch, fields={name: arrays[name] for name in self._fields}, place=place)

    def _gather(self, store: int, draw: int, slots: npt.NDArray[np.int64], out: Arrays) -> None:
        source, direct, aside = self._sources[store], {}, {}
        for name, own in self._own[store].items():
            if own.dtype == out[name].dtype:
                direct[name] = out[name]
            else:
                aside[name] = self._aside(store, name, own, len(slots))
        source.gather(draw, slots, direct | aside)
        for name, array in aside.items():
            to_float32(array, source.value_range, out[name], source.noise_step if name == "noise" else None)
        if "label" not in self._own[store]:
            out["label"][:] = -1
        for name, joined in self._joined[store].items():
            joined.gather(draw, slots, out[name])

    def _aside(self, store: int, name: str, like: npt.NDArray[Any], records: int) -> npt.NDArray[Any]:
        found = self._scratch.get((store, name))
        if found is None or len(found) < records:
            found = self._scratch[store, name] = np.empty((records, *like.shape[1:]), like.dtype)
        return found[:records]


def _scale(name: str, dtype: np.dtype[Any], source: Source) -> tuple[float, float]:
    """(a, b) such that a stored v means a * v + b, for pixels and integer noise. Floats keep their values."""
    if name == "image" and dtype == np.uint8:
        return scale_of(source.value_range)
    return (source.noise_step or 1.0 if name == "noise" and dtype.kind == "i" else 1.0), 0.0


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
            raise StorageError(f"{name} is stored as {', '.join(sorted(kinds))}, with steps {steps}: read without raw")
        else:
            common[name] = np.empty(found[0].shape, np.float32)
    return common
