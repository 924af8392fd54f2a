"""A small sealed store for readers in several processes."""

from __future__ import annotations

import numpy as np
import pytest

from nfm.storage import PairStore, StoreSpec
from nfm.storage.format.spec import pair_fields, write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """500 pairs of 1x4x4 in two draws; the last shard and the last blocks are short."""
    root = tmp_path_factory.mktemp("pairs")
    spec = StoreSpec(
        rows=500,
        rows_per_shard=64,
        rows_per_block=16,
        fields=pair_fields((1, 4, 4)),
        coupling="independent",
        source="ab" * 32,
        classes=10,
    )
    write_spec(root, spec)
    rng = np.random.default_rng(0)
    for draw in range(2):
        for shard in range(spec.shards_per_draw):
            slots = np.array(spec.slots_of(shard))
            record = {
                "image": rng.integers(0, 256, (len(slots), 1, 4, 4), np.uint8),
                "noise": rng.standard_normal((len(slots), 1, 4, 4), np.float32),
                "label": slots % 10,
                "slot": slots,
            }
            commits.publish(root, write_shard(root, spec, draw, shard, "a1", [record]).commit())
    seal.seal(root, 2)
    return PairStore.open(root)
