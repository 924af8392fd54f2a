"""A small pair store, written through the public functions, for the tests that need one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage import PairStore, PairWriter
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec, write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures

Records = Callable[[StoreSpec, int, int], Iterator[dict[str, np.ndarray]]]


def _records(spec: StoreSpec, draw: int, shard: int, chunk: int = 7) -> Iterator[dict[str, np.ndarray]]:
    slots = np.array(spec.slots_of(shard))
    dtype = np.dtype(spec.field("image").dtype)
    for start in range(0, len(slots), chunk):
        part = slots[start : start + chunk]
        record = {
            "image": np.stack([np.full(spec.image_shape, slot % 256, dtype) for slot in part]),
            "noise": np.stack(
                [np.random.default_rng((draw, slot)).normal(size=spec.image_shape) for slot in part]
            ).astype(np.float32),
            "slot": part,
            "flip": part % 2 == 1,
            "row": part,
            "nll": np.full(len(part), 0.5, np.float32),
        }
        yield record | ({"label": part % 10} if spec.has("label") else {})


@pytest.fixture
def records() -> Records:
    """Yields the records of one shard: image filled with the slot's number, noise from (draw, slot)."""
    return _records


@pytest.fixture
def small_spec() -> StoreSpec:
    """50 rows in shards of 20, blocks of 8: the last shard and the last blocks are short."""
    return StoreSpec(
        rows=50,
        rows_per_shard=20,
        rows_per_block=8,
        fields=pair_fields((1, 4, 4), "float16"),
        coupling="independent",
        source="ab" * 32,
        codec="float16",
        classes=10,
        flips=True,
    )


@pytest.fixture
def spec_of() -> Callable[..., StoreSpec]:
    """spec_of("zarr", "int8", image_dtype="float16", label=False): 50 rows in shards of 20, in any layout and codec."""

    def spec(
        layout: str = "blocks", codec: str = "float16", image_dtype: str = "uint8", label: bool = True, **other: Any
    ) -> StoreSpec:
        shape = other.pop("image_shape", (1, 4, 4))
        sizes = {"rows": 50, "rows_per_shard": 20, "rows_per_block": 5 if layout == "zarr" else 8, "flips": True}
        return StoreSpec(
            fields=pair_fields(shape, codec, image_dtype, label),
            coupling="independent",
            source="ab" * 32,
            codec=codec,
            layout=layout,
            **(sizes | other),
        )

    return spec


@pytest.fixture
def make_store(tmp_path: Path, small_spec: StoreSpec) -> Callable[..., Path]:
    """make_store(draws=2) -> the root of a sealed store of `small_spec`."""

    def make(draws: int = 2, spec: StoreSpec = small_spec, name: str = "store", sealed: bool = True) -> Path:
        root = tmp_path / name
        write_spec(root, spec)
        for draw in range(draws):
            for shard in range(spec.shards_per_draw):
                written = write_shard(root, spec, draw, shard, "a1", _records(spec, draw, shard))
                commits.publish(root, written)
        if sealed:
            seal.seal(root, draws)
        return root

    return make


@pytest.fixture
def large_store(make_store: Callable[..., Path], spec_of: Callable[..., StoreSpec]) -> PairStore:
    """120 pairs of 3x32x32 in three shards: 1.6 MB for 64 of them in a batch."""
    return PairStore.open(make_store(1, spec_of(image_shape=(3, 32, 32), rows=120, rows_per_shard=50)))


@pytest.fixture
def add_draw() -> Callable[[Path, StoreSpec], None]:
    """add_draw(root, spec) writes one more draw to a store, as a user's own program does, and seals it."""

    def add(root: Path, spec: StoreSpec) -> None:
        draw = PairStore.open(root).draws
        with PairWriter(root, spec, draws=draw + 1) as writer:
            for shard in range(spec.shards_per_draw):
                for record in _records(spec, draw, shard):
                    del record["slot"]
                    writer.write(**record, draw=draw)

    return add
