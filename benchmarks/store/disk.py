"""What the disk has to do with it: writing shards, opening large stores, and reading what is not in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.rows import RECORDS_PER_SHARD, Array, Workload, in_turns, write_and_publish, write_store
from nfm.storage import PairStore, StoreSpec
from nfm.storage.files.parallel import parallel
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import write_spec
from nfm.storage.layouts.mapped import Mapped

GIB = 1 << 30
_PIECE = 8 << 20  # bytes of a read or a write
_WINDOW = 8  # shards: two windows of them are a good gigabyte here
_SHARDS_WRITTEN = 6
_LIBC = ctypes.CDLL(None, use_errno=True)


def writing(work: Workload, folder: Path, passes: int) -> dict[str, Any]:
    """Payload bytes a second of `write_shard` and `publish`, beside plain writing; every file is synced."""
    records = min(work.records, _SHARDS_WRITTEN * RECORDS_PER_SHARD)
    payload = sum(array[:records].nbytes for array in work.data.values())

    def plain() -> float:
        return _timed(lambda: _write_plain(folder / "plain", work, records), folder / "plain")

    def ours(layout: str) -> float:
        root = folder / f"written-{layout}"
        spec = StoreSpec(
            rows=records, rows_per_shard=RECORDS_PER_SHARD, fields=pair_fields(work.shape), coupling="independent",
            source="random", layout=layout,
        )  # fmt: skip
        write_spec(root, spec)

        def write() -> None:
            for shard in range(spec.shards_per_draw):
                write_and_publish(root, spec, work.part, shard)  # float16 noise, as encoders hand it over

        return _timed(write, root)

    layouts = ("blocks", "samples", "zarr")
    works: dict[str, Callable[[], float]] = {"plain": plain, **{layout: partial(ours, layout) for layout in layouts}}
    seconds = {name: statistics.median(values) for name, values in in_turns(works, passes).items()}
    return {
        "how": f"{records} records in shards of 2048, a file each with one fsync; ours also encodes, hashes, takes "
        "moments, writes index parts and commits",
        "megabytes_per_second": {name: round(payload / value / 1e6, 1) for name, value in seconds.items()},
        "share_of_plain": {layout: round(seconds["plain"] / seconds[layout], 3) for layout in layouts},
    }


def _write_plain(folder: Path, work: Workload, records: int) -> None:
    folder.mkdir()
    for start in range(0, records, RECORDS_PER_SHARD):
        with open(folder / f"{start}.bin", "xb", buffering=0) as file:
            for array in work.part(start, min(start + RECORDS_PER_SHARD, records)).values():
                data = array.reshape(-1).view(np.uint8).data
                for at in range(0, len(data), _PIECE):
                    file.write(data[at : at + _PIECE])
            os.fsync(file.fileno())


def _timed(write: Callable[[], Any], folder: Path) -> float:
    os.sync()  # what others left to write
    started = time.perf_counter()
    write()
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def opening(folder: Path, records: int, passes: int) -> dict[str, Any]:
    """Seconds to open a store of that many (tiny) records, to open it filtered, and to the first batch."""
    root = folder / "many"

    def part(start: int, stop: int) -> dict[str, Array]:
        tiny = np.zeros((stop - start, 1, 1, 1), np.float32)
        return {"image": tiny.astype(np.uint8), "noise": tiny, "label": np.arange(start, stop) % 10}

    write_store(root, part, records)

    def first_batch(**options: Any) -> None:
        reader = PairStore.open(root).batches(256, prefetch=False, **options)
        next(reader)
        reader.close()

    works: dict[str, Callable[[], Any]] = {
        "open": partial(PairStore.open, root),
        "open_and_first_batch": first_batch,
        "open_filtered_and_first_batch": partial(first_batch, filter=[("label", "==", 3)]),
    }
    timed = in_turns({name: partial(_seconds, work) for name, work in works.items()}, passes)
    return {
        "records": records,
        "shards": -(-records // RECORDS_PER_SHARD),
        "seconds": {name: round(statistics.median(values), 4) for name, values in timed.items()},
        "first_seconds": {name: round(values[0], 4) for name, values in timed.items()},
    }


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cold_reading(work: Workload, folder: Path, gib: float, memory_left_gib: float, passes: int) -> dict[str, Any]:
    """Bytes a second of windowed order on a store that is not in the page cache, beside reading its files in order.

    Once with the cache dropped file by file, and once more while so much memory is held that the store does not fit.
    """
    root, each = folder / "cold", work.payload_bytes / work.records
    records = max(work.records, int(gib * GIB / each))

    def part(start: int, stop: int) -> dict[str, Array]:
        rows = np.arange(start, stop) % work.records
        return {name: array[rows] for name, array in work.data.items()}

    write_store(root, part, records)
    files = sorted((root / "shards").iterdir())
    size = sum(file.stat().st_size for file in files)
    works = {
        "disk": partial(_seconds, partial(_read_all, files, 1)),
        "disk_two_streams": partial(_seconds, partial(_read_all, files, 2)),
        "windowed": partial(_seconds, partial(_read_windowed, root, work.batch)),
    }
    found: dict[str, Any] = {
        "how": f"shuffle='windowed', window={_WINDOW}, raw, in shards of 2048; the disk: read() of 8 MiB, file by file",
        "gib": round(size / GIB, 2),
        "two_windows_gib": round(2 * _WINDOW * files[0].stat().st_size / GIB, 2),
    }
    found["cache_dropped"] = _cold_rates(works, files, size, passes)
    if memory_left_gib * GIB > size:
        found["memory_limited"] = {"not_measured": f"the store fits into the {memory_left_gib} GiB that would be left"}
        return found
    with _memory_held(memory_left_gib) as held:
        if isinstance(held, str):
            found["memory_limited"] = {"not_measured": held}
        else:
            found["memory_limited"] = {"memory_left_gib": held, **_cold_rates(works, files, size, passes)}
    return found


def _cold_rates(
    works: Mapping[str, Callable[[], float]], files: Sequence[Path], size: int, passes: int
) -> dict[str, Any]:
    resident = []

    def cold(work: Callable[[], float]) -> float:
        resident.append(_drop(files))
        return work()

    timed = in_turns({name: partial(cold, work) for name, work in works.items()}, passes)
    seconds = {name: statistics.median(values) for name, values in timed.items()}
    return {
        "megabytes_per_second": {name: round(size / value / 1e6, 1) for name, value in seconds.items()},
        "windowed_share_of_disk": round(seconds["disk"] / seconds["windowed"], 3),
        "resident_before": round(max(resident), 4),  # share of a file's pages that dropping left
    }


def _read_all(files: Sequence[Path], streams: int) -> None:
    def read(which: Sequence[Path]) -> None:
        buffer = bytearray(_PIECE)
        for file in which:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    list(parallel(read, [files[stream::streams] for stream in range(streams)], streams))


def _read_windowed(root: Path, batch: int) -> None:
    for _ in PairStore.open(root).batches(batch, shuffle="windowed", window=_WINDOW, raw=True, last="keep"):
        pass


def _drop(files: Sequence[Path]) -> float:
    """Drops files from the page cache; returns the largest share of a file that is still there."""
    left = 0.0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = max(left, resident(path))
    return left


def resident(path: Path) -> float:
    """The share of a file's pages that are in the page cache.

    By mincore: a read with RWF_NOWAIT, which is to find only what is there, may bring in what is not.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        mapped = Mapped.of(path, buffer)
        there = (ctypes.c_ubyte * -(-mapped.bytes // mmap.PAGESIZE))()
        if _LIBC.mincore(ctypes.c_void_p(mapped.address), ctypes.c_size_t(mapped.bytes), there):
            raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in there) / len(there)


_HOLD = """
import mmap, sys
open("/proc/self/oom_score_adj", "w").write("1000")  # if memory runs out, this process goes, nobody else's
held = mmap.mmap(-1, int(sys.argv[1]))
for at in range(0, len(held), 4096):
    held[at] = 1
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def _memory_held(left_gib: float) -> Iterator[float | str]:
    """Another process holds memory until `left_gib` are available to page cache and all; or says why it cannot.

    Needs no privileges, unlike a control group (`systemd-run --scope -p MemoryMax=4G` where one is granted),
    and without swap it binds the page cache just as well.
    """
    if not sys.platform.startswith("linux") or _meminfo("SwapTotal"):
        yield "no Linux without swap here; run under a control group with a memory limit"
        return
    size = _meminfo("MemAvailable") - int(left_gib * GIB)
    if size <= 0:
        yield round(_meminfo("MemAvailable") / GIB, 1)
        return
    command = [sys.executable, "-c", _HOLD, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as holder:
        try:
            assert holder.stdout is not None
            said = holder.stdout.readline()
            yield round(_meminfo("MemAvailable") / GIB, 1) if said else "the memory could not be held"
        finally:
            holder.kill()


def _meminfo(name: str) -> int:
    """A line of /proc/meminfo in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
