"""A batch in parts, each with the places of its records in the batch of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfm.trainers.training import parallel


def parts_of(batch: Any, most: int | None, device: torch.device) -> Iterator[tuple[Any, Tensor | None, float, bool]]:
    """Microbatches of at most `most` records: (part, its places in the whole batch, its share of ours, the last?)."""
    if parallel.size() == 1 and most is None:
        yield batch, None, 1.0, True
        return
    count = _length(batch)
    own = getattr(batch, "place", None)
    places = torch.from_numpy(np.arange(count) + parallel.rank() * count if own is None else np.asarray(own))
    for start in range(0, count, most or count):
        where = slice(start, min(start + (most or count), count))
        yield _rows(batch, where), places[where].to(device), (where.stop - start) / count, where.stop == count


def _length(batch: Any) -> int:
    return len(batch[0]) if isinstance(batch, tuple) else len(batch)


def _rows(batch: Any, where: slice) -> Any:
    """Some records of a batch: of a tensor, or of what holds tensors."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch[where]
    if isinstance(batch, tuple):
        return tuple(_rows(part, where) for part in batch)
    if isinstance(batch, dict):
        return {name: _rows(part, where) for name, part in batch.items()}
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{field.name: _rows(getattr(batch, field.name), where) for field in fields(batch)})
    return batch
