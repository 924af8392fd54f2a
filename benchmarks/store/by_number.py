"""Peers that read any record by its number: TensorStore, ArrayRecord, Grain and Lance, in the fastest way found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.rows import NAMES, RECORDS_PER_SHARD, Array, Reading, Triple, Workload, tensors

CHUNKS = {"image": 1, "noise": 1, "label": RECORDS_PER_SHARD}  # records of a chunk of TensorStore; more are slower


def _shuffled(work: Workload, files: Path, read: Callable[[Array], Sequence[Array]]) -> Reading:
    """Batches of `read(rows)` in a full shuffle; the rows of a batch ascend."""

    def epoch(seed: int) -> Iterator[Triple]:
        order = work.permutation(seed)
        for start in range(0, work.records, work.batch):
            yield tensors(read(np.sort(order[start : start + work.batch])))

    return Reading(epoch, (files,))


def tensorstore(work: Workload) -> Reading:
    import tensorstore as ts

    folder = work.folder / "tensorstore"
    context = ts.Context({"cache_pool": {"total_bytes_limit": 2 * work.payload_bytes}})

    def opened(name: str, array: Array) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
        made = ts.open(
            spec, create=not (folder / name).exists(), open=True, dtype=array.dtype.name, shape=array.shape,
            context=context, recheck_cached=False, chunk_layout=ts.ChunkLayout(
                write_chunk_shape=(RECORDS_PER_SHARD, *array.shape[1:]),
                read_chunk_shape=(CHUNKS[name], *array.shape[1:]),
            ),
        ).result()  # fmt: skip
        made.write(array).result()
        return made

    arrays = [opened(name, work.data[name]) for name in NAMES]

    def read(rows: Array) -> list[Array]:
        futures = [array[rows].read() for array in arrays]
        return [future.result() for future in futures]

    return _shuffled(work, folder, read)


def _array_record(work: Workload) -> Path:
    """A record is the bytes of its image, its noise and its label."""
    from array_record.python.array_record_module import ArrayRecordWriter

    file = work.folder / "records.arrayrecord"
    if not file.exists():
        writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        for image, noise, label in zip(*(work.data[name] for name in NAMES)):
            writer.write(image.tobytes() + noise.tobytes() + label.tobytes())
        writer.close()
    return file


def _parsed(work: Workload, records: Sequence[bytes]) -> list[Array]:
    """The fields of records, as views of their joined bytes."""
    values = math.prod(work.shape)
    joined = np.frombuffer(bytearray().join(records), np.uint8).reshape(len(records), -1)
    image, noise, label = np.split(joined, [values, 3 * values], axis=1)
    floats = noise.view(np.float16)
    return [image.reshape(-1, *work.shape), floats.reshape(-1, *work.shape), label.view(np.int64)[:, 0]]


def array_record(work: Workload) -> Reading:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    file = _array_record(work)
    source = ArrayRecordDataSource(str(file))
    return _shuffled(work, file, lambda rows: _parsed(work, source.__getitems__(rows.tolist())))


def grain(work: Workload) -> Reading:
    import grain

    file = _array_record(work)
    source = grain.sources.ArrayRecordDataSource(str(file))

    def epoch(seed: int) -> Iterator[Triple]:
        order = grain.MapDataset.source(source).shuffle(seed)
        batches = order.batch(work.batch, batch_fn=lambda records: _parsed(work, records))
        for arrays in batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)):
            yield tensors(arrays)

    return Reading(epoch, (file,))


def lance(work: Workload) -> Reading:
    import lance
    import pyarrow as pa

    folder = work.folder / "records.lance"
    if not folder.exists():
        values = math.prod(work.shape)
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(work.data[name].reshape(-1)), values)
            for name in ("image", "noise")
        }
        lance.write_dataset(pa.table({**columns, "label": work.data["label"]}), str(folder))
    dataset = lance.dataset(str(folder))

    def column(table: Any, name: str) -> Array:
        return table[name].combine_chunks().flatten().to_numpy().reshape(-1, *work.shape)

    def read(rows: Array) -> list[Array]:
        table = dataset.take(pa.array(rows), columns=list(NAMES))
        return [column(table, "image"), column(table, "noise"), table["label"].to_numpy()]

    return _shuffled(work, folder, read)
