"""How fast pairs come off the disk: our reader beside stock WebDataset and a plain copy, in one run.

`python benchmarks/reader.py [--records N] [--shape C,H,W]` makes a store of random pairs in a temporary folder, reads
it in shuffled batches of 256 with a warm cache, and writes `benchmarks/results/reader.json`: records a second, the
median of several passes each.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import webdataset as wds

from nfm.storage import PairStore, StoreSpec, commits, generations
from nfm.storage.schema import pair_fields, write_spec

BATCH = 256


def make_store(root: Path, records: int, shape: tuple[int, int, int]) -> PairStore:
    """A store of uint8 images and float16 noise."""
    spec = StoreSpec(
        rows=records, rows_per_shard=2048, fields=pair_fields(shape), coupling="independent", source="random"
    )
    write_spec(root, spec)
    rng = np.random.default_rng(0)
    for shard in range(spec.shards_per_draw):
        slots = np.arange(spec.slots_of(shard).start, spec.slots_of(shard).stop)
        record = {
            "image": rng.integers(0, 256, (len(slots), *shape), np.uint8),
            "noise": rng.standard_normal((len(slots), *shape), np.float32),
            "label": slots % 10,
            "slot": slots,
        }
        commits.publish(root, commits.write_shard(root, spec, 0, shard, "bench", [record]).commit())
    generations.seal(root, 1)
    return PairStore.open(root)


def ours(store: PairStore) -> int:
    """Shuffled batches, converted to float32, read ahead by one thread."""
    return sum(len(batch.image) for batch in store.batches(BATCH, last="keep"))


def stock(store: PairStore) -> int:
    """Stock WebDataset over the same tars: whole blocks, decoded, converted to float32, no shuffle between records."""
    shards = [str(store.root / shard["payload"]) for shard in store.manifest["shards"]]
    seen = 0
    for block in wds.WebDataset(shards, shardshuffle=False).decode():
        image = block["image.npy"].astype(np.float32) / 127.5 - 1
        seen += len(image) + 0 * len(block["noise.npy"].astype(np.float32))
    return seen


def copy(arrays: list[np.ndarray]) -> int:
    """The limit without shuffle and conversion: the same bytes copied in memory, a batch at a time."""
    for start in range(0, len(arrays[0]), BATCH):
        for array in arrays:
            array[start : start + BATCH].copy()
    return len(arrays[0])


def rate(work: Callable[[], int], passes: int) -> float:
    """Records a second, the median of some passes after one that warms up."""
    rates = []
    for _ in range(passes + 1):
        started = time.perf_counter()
        records = work()
        rates.append(records / (time.perf_counter() - started))
    return statistics.median(rates[1:])


@click.command()
@click.option("--records", default=20_000, show_default=True)
@click.option("--shape", default="3,64,64", show_default=True, help="C,H,W of the images.")
@click.option("--passes", default=5, show_default=True)
@click.option(
    "-o", "--output", default="benchmarks/results/reader.json", show_default=True, type=click.Path(path_type=Path)
)
def main(records: int, shape: str, passes: int, output: Path) -> None:
    channels, height, width = (int(size) for size in shape.split(","))
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), records, (channels, height, width))
        everything = store.gather(0, np.arange(records))
        rates = {
            "plain copy, no shuffle, no conversion": rate(
                lambda: copy([everything["image"], everything["noise"]]), passes
            ),
            "PairStore.batches, shuffled, float32": rate(lambda: ours(store), passes),
            "stock WebDataset, blocks in order, float32": rate(lambda: stock(store), passes),
        }
    body = {
        "records": records,
        "shape": [channels, height, width],
        "batch": BATCH,
        "records_per_second": {name: round(value) for name, value in rates.items()},
        "machine": f"{platform.machine()}, {platform.python_version()}",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(body, indent=2) + "\n")
    click.echo(json.dumps(body, indent=2))


if __name__ == "__main__":
    main()
