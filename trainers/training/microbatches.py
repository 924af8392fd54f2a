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
    count = _length(batch)
    places = getattr(batch, "place", None)
    if places is None and parallel.size() > 1:
        places = np.arange(count) + parallel.rank() * count
    step = most or count
    alone = parallel.size() == 1 and step >= count
    for start in range(0, count, step):
        where = slice(start, min(start + step, count))
        if alone:
            yield batch, None, 1.0, True
            return
        chosen = torch.from_numpy(np.arange(count) if places is None else np.asarray(places))[where].to(device)
        yield _rows(batch, where), chosen, (where.stop - start) / count, where.stop == count


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
