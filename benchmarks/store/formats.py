"""Peers that are formats of arrays or tables, Hugging Face datasets, Zarr and Parquet, in the fastest way found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store.rows import NAMES, Array, Reading, Triple, Workload, tensors

CHUNK = 256  # records of a Zarr chunk
GROUP = 1024  # records of a Parquet row group
POOL = 2048  # records that are mixed with each other where a format is read in blocks


def _mixed(work: Workload, seed: int, size: int, read: Callable[[int], Sequence[Array]]) -> Iterator[Triple]:
    """Blocks of `size` records in a shuffled order, POOL records of them shuffled together, in memory used again."""
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(math.ceil(work.records / size))
    each = max(1, POOL // size)
    pool = [np.empty((each * size, *work.data[name].shape[1:]), work.data[name].dtype) for name in NAMES]
    for first in range(0, len(blocks), each):
        held = 0
        for block in blocks[first : first + each].tolist():
            arrays = read(block)
            for target, array in zip(pool, arrays):
                target[held : held + len(array)] = array
            held += len(arrays[0])
        order = rng.permutation(held)
        for start in range(0, held, work.batch):
            rows = order[start : start + work.batch]
            yield tensors([array[rows] for array in pool])


def _hugging_face(work: Workload) -> tuple[Any, Path]:
    """The records as fixed-size lists, which Arrow lays out like arrays."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    folder = work.folder / "huggingface"
    if not folder.exists():
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), math.prod(work.shape))
            for name, array in work.data.items() if name != "label"
        }  # fmt: skip
        datasets.Dataset(pa.table({**columns, "label": work.data["label"]})).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder)), folder


def hugging_face_torch(work: Workload) -> Reading:
    dataset, folder = _hugging_face(work)
    dataset = dataset.with_format("torch")

    def epoch(seed: int) -> Iterator[Triple]:
        for batch in dataset.shuffle(seed=seed, keep_in_memory=True).iter(work.batch):
            image, noise = (batch[name].view(-1, *work.shape) for name in ("image", "noise"))
            yield image, noise, batch["label"]

    return Reading(epoch, (folder,))


def hugging_face_array3d(work: Workload) -> Reading:
    """The way of the documentation's page on arrays."""
    import datasets

    datasets.disable_progress_bars()
    folder = work.folder / "huggingface-array3d"
    kinds = {"image": datasets.Array3D(work.shape, "uint8"), "noise": datasets.Array3D(work.shape, "float16")}

    def records() -> Iterator[dict[str, Any]]:
        for image, noise, label in zip(*(work.data[name] for name in NAMES)):
            yield {"image": image, "noise": noise, "label": int(label)}

    features = datasets.Features({**kinds, "label": datasets.Value("int64")})
    made = datasets.Dataset.from_generator(records, features, cache_dir=str(folder), writer_batch_size=CHUNK)
    dataset = made.with_format("torch")

    def epoch(seed: int) -> Iterator[Triple]:
        for batch in dataset.shuffle(seed=seed, keep_in_memory=True).iter(work.batch):
            yield batch["image"], batch["noise"], batch["label"]

    return Reading(epoch, (folder,))


def hugging_face_arrow(work: Workload) -> Reading:
    dataset, folder = _hugging_face(work)
    dataset = dataset.with_format("arrow")
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes

    def column(table: Any, name: str) -> Array:
        return table[name].combine_chunks().flatten().to_numpy().reshape(-1, *work.shape)

    def epoch(seed: int) -> Iterator[Triple]:
        order = work.permutation(seed)
        for start in range(0, work.records, work.batch):
            table = dataset[np.sort(order[start : start + work.batch])]
            yield tensors([column(table, "image"), column(table, "noise"), table["label"].to_numpy()])

    return Reading(epoch, (folder,))


def _zarr(work: Workload) -> tuple[list[Any], Path]:
    import zarr

    folder = work.folder / "zarr"
    if not folder.exists():
        group = zarr.create_group(str(folder))
        for name, array in work.data.items():
            made = group.create_array(
                name, shape=array.shape, dtype=array.dtype, chunks=(CHUNK, *array.shape[1:]), compressors=None
            )
            made[:] = array
    group = zarr.open_group(str(folder), mode="r")
    return [group[name] for name in NAMES], folder


def zarr_pool(work: Workload) -> Reading:
    arrays, folder = _zarr(work)

    def read(block: int) -> list[Array]:
        return [array[block * CHUNK : (block + 1) * CHUNK] for array in arrays]

    return Reading(lambda seed: _mixed(work, seed, CHUNK, read), (folder,))


def zarr_records(work: Workload) -> Reading:
    arrays, folder = _zarr(work)

    def epoch(seed: int) -> Iterator[Triple]:
        order = work.permutation(seed)
        for start in range(0, work.records, work.batch):
            rows = np.sort(order[start : start + work.batch])
            yield tensors([array.oindex[rows] for array in arrays])

    return Reading(epoch, (folder,))


def parquet(work: Workload) -> Reading:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = work.folder / "records.parquet"
    data = work.data
    columns = {
        name: pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(data[name][0].nbytes), work.records, [None, pa.py_buffer(data[name])]
        )
        for name in ("image", "noise")
    }
    pq.write_table(
        pa.table({**columns, "label": data["label"]}), file, row_group_size=GROUP, compression="none",
        use_dictionary=False, write_statistics=False,
    )  # fmt: skip
    opened = pq.ParquetFile(file, memory_map=True)

    def read(block: int) -> list[Array]:
        group = opened.read_row_group(block, use_threads=False)
        found = []
        for name in ("image", "noise"):
            column = group[name].combine_chunks()
            column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            values = np.frombuffer(column.buffers()[1], data[name].dtype)
            found.append(values[: len(column) * math.prod(work.shape)].reshape(-1, *work.shape))
        return [*found, group["label"].to_numpy()]

    return Reading(lambda seed: _mixed(work, seed, GROUP, read), (file,))
