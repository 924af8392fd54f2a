"""A small sealed store for readers in several processes."""

from __future__ import annotations

import numpy as np
import pytest

from nfm.storage import PairStore, PairWriter, StoreSpec
from nfm.storage.format.fields import pair_fields


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
    rng = np.random.default_rng(0)
    with PairWriter(root, spec, draws=2) as writer:
        for draw in range(2):
            image = rng.integers(0, 256, (500, 1, 4, 4), np.uint8)
            noise = rng.standard_normal((500, 1, 4, 4), np.float32)
            writer.write(image=image, noise=noise, label=np.arange(500) % 10, draw=draw)
    return PairStore.open(root)
