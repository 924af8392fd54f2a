"""The peers, each in its own format and read in the fastest way that its documentation offers, as tried here.

Nothing is compressed: it is all random bits. Rows with workers are there for comparison; on few cores they lose.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.store.by_number import array_record, grain, lance, tensorstore
from benchmarks.store.formats import (
    CHUNK,
    GROUP,
    POOL,
    hugging_face_array3d,
    hugging_face_arrow,
    hugging_face_torch,
    parquet,
    zarr_pool,
    zarr_records,
)
from benchmarks.store.rows import NAMES, Reading, Row, Triple, Workload, tensors


def _stacked(records: Sequence[Sequence[Any]]) -> Triple:
    """Records as a batch: a third faster than torch's default collation."""
    return tensors([np.stack([np.asarray(record[i]) for record in records]) for i in range(3)])


def _tars(work: Workload, layout: str) -> list[str]:
    store = work.store(layout)
    return [str(store.root / shard.payload.path) for shard in store.sealed.shards]


def webdataset_blocks(work: Workload) -> Reading:
    import webdataset as wds

    tars = _tars(work, "blocks")

    def epoch(seed: int) -> Iterator[Triple]:
        blocks = wds.WebDataset(tars, shardshuffle=100, seed=seed).decode()
        records = blocks.to_tuple("image.npy", "noise.npy", "label.npy").unbatched().shuffle(POOL)
        yield from records.batched(work.batch, collation_fn=_stacked)

    return Reading(epoch, (work.store("blocks").root,))


def webdataset_whole_blocks(work: Workload) -> Reading:
    import webdataset as wds

    tars = _tars(work, "blocks")

    def epoch(seed: int) -> Iterator[Triple]:
        rng = np.random.default_rng(seed)
        blocks = wds.WebDataset(tars, shardshuffle=100, seed=seed).shuffle(POOL // 256).decode()
        for arrays in blocks.to_tuple("image.npy", "noise.npy", "label.npy"):
            order = rng.permutation(len(arrays[0]))
            yield tensors([array[order] for array in arrays])

    return Reading(epoch, (work.store("blocks").root,))


def webdataset_samples(work: Workload, workers: int) -> Reading:
    import webdataset as wds

    tars = _tars(work, "samples")

    def epoch(seed: int) -> Iterator[Triple]:
        shards = wds.WebDataset(tars, shardshuffle=100, seed=seed, empty_check=False)
        records = shards.shuffle(POOL).decode().to_tuple("image.npy", "noise.npy", "cls")
        batches = records.batched(work.batch, collation_fn=_stacked)
        yield from wds.WebLoader(batches, batch_size=None, num_workers=workers) if workers else batches

    return Reading(epoch, (work.store("samples").root,))


def mds(work: Workload, workers: int) -> Reading:
    # It imports torchvision, whose operators need the torch build it was made for; none of them is used here.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    folder = work.folder / "mds"
    if not folder.exists():
        dims = ",".join(map(str, work.shape))
        columns = {"image": f"ndarray:uint8:{dims}", "noise": f"ndarray:float16:{dims}", "label": "int64"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 26) as writer:
            for image, noise, label in zip(*(work.data[name] for name in NAMES)):
                writer.write({"image": image, "noise": noise, "label": int(label)})
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=workers > 0, shuffle_algo="py1e", batch_size=work.batch)

    def random_access(seed: int) -> Iterator[Triple]:
        order = work.permutation(seed)
        for start in range(0, work.records, work.batch):
            yield _stacked([_values(dataset[int(row)]) for row in order[start : start + work.batch]])

    if not workers:
        return Reading(random_access, (folder,))
    loader = DataLoader(
        dataset, batch_size=work.batch, num_workers=workers, collate_fn=_stacked_dicts, persistent_workers=True
    )
    return Reading(lambda _: iter(loader), (folder,))


def _values(record: dict[str, Any]) -> list[Any]:
    return [record[name] for name in NAMES]


def _stacked_dicts(records: Sequence[dict[str, Any]]) -> Triple:
    return _stacked([_values(record) for record in records])


def litdata(work: Workload) -> Reading:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder = work.folder / "litdata"
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=1 << 26)
    for number, (image, noise, label) in enumerate(zip(*(work.data[name] for name in NAMES))):
        writer[number] = {"image": image, "noise": noise, "label": int(label)}
    writer.done()
    writer.merge()
    loader = StreamingDataLoader(StreamingDataset(str(folder), shuffle=True), batch_size=work.batch, num_workers=0)

    def epoch(_: int) -> Iterator[Triple]:  # the loader counts its epochs itself
        for batch in loader:
            yield batch["image"], batch["noise"], batch["label"]

    return Reading(epoch, (folder,))


SAMPLES, MDS, LITDATA = "WebDataset, our samples", "MosaicML Streaming, random access", "litData"
HF_ARRAYS, HF_LISTS = "Hugging Face datasets, Array3D", "Hugging Face datasets, fixed-size lists"
HF_ARROW, ZARR_POOL = "Hugging Face datasets, Arrow by hand", "Zarr, chunks in a pool"
PEERS = (
    Row("WebDataset, our blocks", "peer", f"unbatched().shuffle({POOL}).batched(256), np.stack", webdataset_blocks,
        ("webdataset",)),
    Row("WebDataset, our blocks whole", "peer", "a shuffled block is a batch: records of a block stay together",
        webdataset_whole_blocks, ("webdataset",)),
    Row(SAMPLES, "peer", f".npy members, shuffle({POOL}).decode().batched(256), np.stack",
        partial(webdataset_samples, workers=0), ("webdataset",)),
    Row("WebDataset, our samples, 2 workers", "peer", "the same behind WebLoader",
        partial(webdataset_samples, workers=2), ("webdataset",)),
    Row(MDS, "peer", "dataset[row] in a full shuffle, np.stack", partial(mds, workers=0), ("streaming",)),
    Row("MosaicML Streaming, 2 workers", "peer", "DataLoader, shuffle py1e, np.stack", partial(mds, workers=2),
        ("streaming",)),
    Row(LITDATA, "peer", "StreamingDataLoader(shuffle=True), in process: shuffles chunks, and within 64 MiB chunks",
        litdata, ("litdata",)),
    Row(HF_ARRAYS, "peer", "shuffle(seed).with_format('torch').iter(256), which widens to int64 and float32",
        hugging_face_array3d, ("datasets",)),
    Row(HF_LISTS, "peer", "the same over fixed-size lists, reshaped", hugging_face_torch, ("datasets",)),
    Row(HF_ARROW, "peer", "fixed-size lists, with_format('arrow'), 256 random rows, Arrow's buffers as tensors",
        hugging_face_arrow, ("datasets",)),
    Row(ZARR_POOL, "peer", f"chunks of {CHUNK} in a shuffled order, {POOL} records mixed", zarr_pool, ("zarr",)),
    Row("Zarr, random records", "peer", "oindex of 256 sorted rows, full shuffle", zarr_records, ("zarr",)),
    Row("TensorStore, zarr3", "peer", "array[256 sorted rows].read(), shards of single records, decoded ones cached",
        tensorstore, ("tensorstore",)),
    Row("Lance", "peer", "take(256 sorted rows), fixed-size lists, Arrow's buffers as tensors", lance, ("lance",)),
    Row("ArrayRecord", "peer", "__getitems__ of 256 sorted rows, group_size:1, uncompressed, joined", array_record,
        ("array_record",)),
    Row("Grain, ArrayRecord", "peer", "MapDataset.shuffle(seed).batch(256) of the same files, num_threads=0", grain,
        ("grain", "array_record")),
    Row("Parquet, row groups in a pool", "peer", f"row groups of {GROUP}, fixed-size binary, mapped, {POOL} mixed",
        parquet, ("pyarrow",)),
)  # fmt: skip
