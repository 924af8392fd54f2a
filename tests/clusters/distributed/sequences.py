"""What readers yield, written down so that other processes' sequences can be compared with it byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIELDS = ("slot", "draw", "label", "image", "noise")
Recorded = list[dict[str, np.ndarray]]  # one entry a batch, arrays by field


def record(batches: Iterable[Any]) -> Recorded:
    """Copies of the batches of a reader, or of a DataLoader's dicts."""
    return [
        {name: np.asarray(batch[name] if isinstance(batch, dict) else getattr(batch, name)).copy() for name in FIELDS}
        for batch in batches
    ]


def join(ranks: Sequence[Recorded]) -> Recorded:
    """The global batches, from what the ranks saw, in their order."""
    assert len({len(rank) for rank in ranks}) == 1, "the ranks saw different numbers of batches"
    return [{name: np.concatenate([part[name] for part in parts]) for name in FIELDS} for parts in zip(*ranks)]


def assert_same(found: Recorded, wanted: Recorded) -> None:
    """Fails unless both are the same batches in the same order, byte for byte."""
    assert wanted
    assert len(found) == len(wanted)
    for step, (here, there) in enumerate(zip(found, wanted)):
        for name in FIELDS:
            assert here[name].dtype == there[name].dtype
            assert np.array_equal(here[name], there[name]), f"{name} of batch {step}"


def save(path: Path, batches: Recorded) -> None:
    """Writes a sequence to a file."""
    np.savez(path, **{f"{step}.{name}": batch[name] for step, batch in enumerate(batches) for name in FIELDS})


def load(path: Path) -> Recorded:
    """A sequence that `save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        steps = len(arrays.files) // len(FIELDS)
        return [{name: arrays[f"{step}.{name}"] for name in FIELDS} for step in range(steps)]
