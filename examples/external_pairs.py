"""Pairs of your own in a store, and a student on them: `python examples/external_pairs.py STORE` (a folder or a URL).

The teacher here is a closed form: for data ~ N(m, S) the flow from data to noise is z = S^(-1/2) (x - m). In its place
stands whatever makes your pairs: an EDM model's deterministic sampler, a simulation, files that you have. Killed and
started again, it goes on where it was.
"""

from __future__ import annotations

import sys

import numpy as np
from own_trainer import train

from nfm.storage import PairWriter, StoreSpec

ROWS, CLASSES, SHAPE = 600, 3, (1, 4, 4)
MEAN, SCALE = np.array([-0.3, 0.0, 0.3]), 0.2


def pair(slot: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(image, noise, label) of a slot, always the same."""
    label = slot % CLASSES
    image = MEAN[label] + SCALE * np.random.default_rng(slot).standard_normal(SHAPE)
    pixels = np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels, (pixels / 127.5 - 1 - MEAN[label]) / SCALE, label


def write(path: str) -> None:
    """A sealed store of the pairs."""
    origin = "closed form: three Gaussians, z = (x - m) / 0.2"
    spec = StoreSpec.external(rows=ROWS, image_shape=SHAPE, classes=CLASSES, rows_per_shard=256, origin=origin)
    with PairWriter(path, spec) as writer:
        for slot in range(writer.next_slot(), ROWS):
            image, noise, label = pair(slot)
            writer.write(image=image, noise=noise, label=label)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write(sys.argv[1])
    print(f"loss {train(sys.argv[1])[1]:.4f}")
