"""What is measured beside each other: the records, the rows of the table, the limit, and our own reader's rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from nfm.storage import PairStore, StoreSpec
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.philox import normals
from nfm.storage.format.spec import write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.reading.gathering.compiled import loops

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
T = TypeVar("T")
Triple = tuple["Tensor", "Tensor", "Tensor"]  # image, noise, label: [n, C, H, W], [n, C, H, W], [n]
Epoch = Callable[[int], Iterator[Triple]]  # shuffled batches of the epoch with this seed
Part = Callable[[int, int], dict[str, Array]]  # the fields of records start to stop
RECORDS_PER_SHARD = 2048
NAMES = ("image", "noise", "label")
HANDED_OVER = 512  # records, from an encoder to the store


@dataclass(frozen=True)
class Reading:
    """Something ready to be read: its epochs, the files they come from, and `noise(number)` if it is not the data's."""

    epoch: Epoch
    files: tuple[Path, ...] = ()
    noise: Callable[[int], Array] | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table. `how` says how it is read, `needs` which packages it takes beyond torch."""

    name: str
    kind: Literal["limit", "ours", "peer"]
    how: str
    make: Callable[[Workload], Reading]
    needs: tuple[str, ...] = ()


@dataclass
class Workload:
    """The same records for all: uint8 image, float16 noise, int64 label; the label is the record's number."""

    folder: Path
    records: int
    shape: tuple[int, int, int]
    batch: int
    stores: dict[str, PairStore] = field(default_factory=dict)

    @cached_property
    def data(self) -> dict[str, Array]:
        """The records as arrays: the source of every copy on disk, and what is checked against."""
        rng = np.random.default_rng(0)
        noise = np.empty((self.records, *self.shape), np.float16)
        for start in range(0, self.records, 1024):
            part = noise[start : start + 1024]
            part[...] = rng.standard_normal(part.shape, np.float32)
        return {
            "image": rng.integers(0, 256, (self.records, *self.shape), np.uint8),
            "noise": noise,
            "label": np.arange(self.records),
        }

    @property
    def payload_bytes(self) -> int:
        """What any format has to hold."""
        return sum(array.nbytes for array in self.data.values())

    def store(self, layout: str) -> PairStore:
        """The records as a pair store, written at the first call."""
        if layout not in self.stores:
            root = self.folder / f"ours-{layout}"
            write_store(root, self.part, self.records, layout)
            self.stores[layout] = PairStore.open(root)
        return self.stores[layout]

    def part(self, start: int, stop: int) -> dict[str, Array]:
        """Records start to stop, of all fields."""
        return {name: array[start:stop] for name, array in self.data.items()}

    def permutation(self, seed: int) -> Array:
        """A shuffled order, for peers that leave it to their users."""
        return np.random.default_rng(seed).permutation(self.records)


def write_store(root: Path, part: Part, records: int, layout: str = "blocks", codec: str = "float16") -> None:
    """A sealed store of one draw of that many records, of which `part(start, stop)` gives some."""
    shape = part(0, 1)["image"].shape[1:]
    spec = StoreSpec(
        rows=records, rows_per_shard=RECORDS_PER_SHARD, fields=pair_fields(shape, codec), coupling="independent",
        source="random", layout=layout, codec=codec,
    )  # fmt: skip
    write_spec(root, spec)
    for shard in range(spec.shards_per_draw):
        write_and_publish(root, spec, part, shard)
    seal.seal(root, 1)


def write_and_publish(root: Path, spec: StoreSpec, part: Part, shard: int) -> None:
    """One shard, its records handed over some at a time, as a worker does."""
    slots = spec.slots_of(shard)
    ranges = [(start, min(start + HANDED_OVER, slots.stop)) for start in range(slots.start, slots.stop, HANDED_OVER)]
    records = ({**part(start, stop), "slot": np.arange(start, stop)} for start, stop in ranges)
    commits.publish(root, write_shard(root, spec, 0, shard, "bench", records))


def tensors(arrays: Sequence[Array]) -> Triple:
    """A batch as torch tensors over the arrays' memory."""
    import torch

    image, noise, label = (torch.from_numpy(np.asarray(array)) for array in arrays)
    return image, noise, label


def copied(work: Workload) -> Reading:
    """The limit: the same bytes, in their order, into one batch's memory."""
    return _copied(work, work.data)


def copied_as_float32(work: Workload) -> Reading:
    """The limit of float32: the records as they are after conversion, 2.7 times as many bytes, copied as above."""
    image, noise = (work.data[name].astype(np.float32) for name in ("image", "noise"))
    image *= np.float32(2 / 255)
    image -= np.float32(1)
    return _copied(work, {"image": image, "noise": noise, "label": work.data["label"]})


def _copied(work: Workload, data: Mapping[str, Array]) -> Reading:
    memory = {name: np.empty((work.batch, *array.shape[1:]), array.dtype) for name, array in data.items()}
    out = tensors([memory[name] for name in ("image", "noise", "label")])

    def epoch(_: int) -> Iterator[Triple]:
        for start in range(0, work.records, work.batch):
            count = min(work.batch, work.records - start)
            for name, array in data.items():
                np.copyto(memory[name][:count], array[start : start + count])
            image, noise, label = out
            yield image[:count], noise[:count], label[:count]

    return Reading(epoch)


def ours(layout: str, **options: Any) -> Callable[[Workload], Reading]:
    """`PairStore.batches` on a store of this layout."""

    def make(work: Workload) -> Reading:
        store = work.store(layout)

        def epoch(seed: int) -> Iterator[Triple]:
            for batch in store.batches(work.batch, seed, device="cpu", last="keep", **options):
                yield batch.image, batch.noise, batch.label

        return Reading(epoch, (store.root,))

    return make


def without_loops(make: Callable[[Workload], Reading]) -> Callable[[Workload], Reading]:
    """The same as where numba is not installed."""

    def made(work: Workload) -> Reading:
        reading = make(work)

        def epoch(seed: int) -> Iterator[Triple]:
            on, loops.on = loops.on, False
            try:
                yield from reading.epoch(seed)
            finally:
                loops.on = on

        return replace(reading, epoch=epoch)

    return made


def ours_seeded(**options: Any) -> Callable[[Workload], Reading]:
    """`PairStore.batches` on a store of the same images, whose noise is drawn and not kept."""

    def make(work: Workload) -> Reading:
        root = work.folder / "ours-seeded"
        if not root.exists():

            def part(start: int, stop: int) -> dict[str, Array]:
                return work.part(start, stop) | {"noise": drawn(np.arange(start, stop), work.shape)}

            write_store(root, part, work.records, codec="seeded")
        store = PairStore.open(root)

        def epoch(seed: int) -> Iterator[Triple]:
            for batch in store.batches(work.batch, seed, device="cpu", last="keep", raw=True, **options):
                yield batch.image, batch.noise, batch.label

        return Reading(epoch, (root,), lambda number: drawn(np.array([number]), work.shape)[0])

    return make


def drawn(slots: Array, shape: tuple[int, ...]) -> Array:
    """The noise that seed 0 draws for these slots: float32 [n, C, H, W]."""
    return normals(0, 0, slots, math.prod(shape)).reshape(-1, *shape)


def ours_through_workers(work: Workload) -> Reading:
    """`as_torch_dataset` behind a DataLoader whose workers stay alive between epochs."""
    from torch.utils.data import DataLoader

    store = work.store("blocks")
    dataset = store.as_torch_dataset(work.batch, last="keep", raw=True)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)

    def epoch(seed: int) -> Iterator[Triple]:
        dataset.set_epoch(seed)
        for batch in loader:
            yield batch["image"], batch["noise"], batch["label"]

    return Reading(epoch, (store.root,))


COPY, INLINE = "plain copy", "ours: blocks, raw, inline"
PREFETCHED, ZARR = "ours: blocks, raw, prefetch threads", "ours: Zarr, raw, inline"
FLOAT32, FLOAT32_PREFETCHED = "ours: blocks, float32, inline", "ours: blocks, float32, prefetch threads"
_OURS: dict[str, tuple[str, dict[str, Any]]] = {
    INLINE: ("batches(raw=True, prefetch=False)", {"raw": True, "prefetch": False}),
    PREFETCHED: ("batches(raw=True)", {"raw": True}),
    FLOAT32: ("batches(prefetch=False), converted on the host", {"prefetch": False}),
    FLOAT32_PREFETCHED: ("batches(), converted on the host", {}),
}
ROWS = (
    Row(COPY, "limit", "the same bytes from memory to one batch's memory, in order", copied),
    Row("plain copy, as float32", "limit", "the records converted before, copied the same way", copied_as_float32),
    *(Row(name, "ours", f"{how}, full shuffle", ours("blocks", **options)) for name, (how, options) in _OURS.items()),
    *(Row(f"{name}, without numba", "ours", "the same by numpy and torch", without_loops(ours("blocks", **options)))
      for name, (_, options) in _OURS.items()),
    Row("ours: blocks, seeded, inline", "ours", "as inline, noise made from its seed, float32",
        ours_seeded(prefetch=False)),
    Row("ours: blocks, seeded, prefetch threads", "ours", "the same in threads", ours_seeded()),
    Row("ours: samples, raw, inline", "ours", "as above, layout samples", ours("samples", raw=True, prefetch=False)),
    Row(ZARR, "ours", "as above, layout zarr: mapped chunks", ours("zarr", raw=True, prefetch=False)),
    Row("ours: blocks, raw, 2 loader workers", "ours", "as_torch_dataset(raw=True) in a DataLoader",
        ours_through_workers),
)  # fmt: skip


def in_turns(works: Mapping[str, Callable[[], T]], passes: int) -> dict[str, list[T]]:
    """The results of all works by name, pass by pass, each pass beginning with another: noise hits all alike."""
    names = list(works)
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(passes):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(works[name]())
    return found


def checked_epoch(work: Workload, reading: Reading, seconds: float) -> int:
    """Reads an epoch, or for `seconds`, and compares with the data; returns the records seen. Raises ValueError.

    The first record of every batch must be the one its label names, and no epoch may lose or repeat a record.
    """
    seen, stop = [], time.perf_counter() + seconds
    for image, noise, label in reading.epoch(0):
        number, found = int(label[0]), label.numpy().copy()
        seen.append(found)
        for name, value in (("image", image), ("noise", noise)):
            if reading.noise is not None and name == "noise":
                expected = reading.noise(number)
            else:
                expected = work.data[name][number]
            got = value[0].numpy()
            if got.dtype != expected.dtype and name == "image" and got.dtype == np.float32:
                expected = expected.astype(np.float32) * np.float32(2 / 255) - np.float32(1)
            if len(found) != len(value) or not np.array_equal(got, expected):
                raise ValueError(f"{name} {number} is not the one that was written")
        if time.perf_counter() > stop:
            break
    labels = np.concatenate(seen)
    if len(np.unique(labels)) < min(len(labels), work.records):
        raise ValueError("a record came twice")
    if time.perf_counter() <= stop and len(labels) < work.records:
        raise ValueError(f"{len(labels)} of {work.records} records came")
    return len(labels)


def rate(reading: Reading, seeds: Iterator[int], least: float, most: float) -> tuple[float, float]:
    """Records a second of whole epochs that take `least` seconds or more together, and of processor time.

    One epoch goes before, untimed, for the caches that others filled in the meantime. Reading ends after `most`
    seconds, if need be in the middle of an epoch.
    """
    _read(reading, next(seeds), least)
    started, cpu, records, seconds = time.perf_counter(), time.process_time(), 0, 0.0
    while not records or (seconds := time.perf_counter() - started) < least:
        records += _read(reading, next(seeds), most - seconds)
    return records / (time.perf_counter() - started), records / (time.process_time() - cpu)


def _read(reading: Reading, seed: int, seconds: float) -> int:
    """The records of an epoch, or of its first `seconds`."""
    records, stop = 0, time.perf_counter() + seconds
    for image, _, _ in reading.epoch(seed):
        records += len(image)
        if time.perf_counter() > stop:
            break
    return records
