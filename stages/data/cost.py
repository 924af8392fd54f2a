"""What a data stage costs before it runs: images, bytes on disk, and the time, of some images that it decodes."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.data import parts as of_parts
from nfm.stages.data.config import DataConfig
from nfm.stages.data.ingest import image_shape, ingest_shard, threads_of
from nfm.stages.data.source import Encoded
from nfm.stages.data.sources import Source
from nfm.stages.executors.jobs import Job, new_attempt
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.devices import timing
from nfm.stages.trained.devices.launched import Silent
from nfm.stages.trained.devices.timing import Clock

FIRST = 8  # images that tell how many can be decoded in the time
NO_TIME = "no time (nothing is decoded for images that are not there; give --rate, or plan with the data itself)"


def of_planned(facts: Mapping[str, Any], timed: bool) -> Cost:
    """The cost of images that are not looked at: `facts` tell how many, and their shape."""
    images, value = facts["images"] + facts.get("heldout", 0), np.dtype(facts.get("image_dtype", "uint8"))
    size = images * math.prod(facts["image_shape"]) * value.itemsize
    return Cost(images, "images", bytes=size, unknown=NO_TIME if timed else "")


def of_source(config: DataConfig, source: Source, rows: np.ndarray, clock: Clock | None) -> Cost:
    """The cost of these rows of a source, in the order in which they are written.

    Of encoded images, where there is a clock, a few are decoded and written as the stage does it. Arrays are only
    copied: they are counted.
    """
    if not isinstance(source, Encoded):
        return Cost(len(rows), "images")
    size = source.look(Silent())
    cost = Cost(len(rows), "images", bytes=len(rows) * math.prod(image_shape(config, size)))
    if clock is None or not len(rows):
        return cost
    found: float = clock.once(
        "the decoding of images here", config.model_dump(mode="json"),
        lambda: decoded_a_second(source, rows, size, config.rows_per_shard, timing.SECONDS),
    )  # fmt: skip
    threads = threads_of(config) or os.cpu_count() or 1
    words = f"by {threads} thread{'s' if threads > 1 else ''}{'' if config.executor == 'serial' else ' of one worker'}"
    return replace(cost, told=words, seconds=len(rows) / found)


def decoded_a_second(
    source: Encoded, rows: np.ndarray, size: tuple[int, int], rows_per_shard: int, seconds: float
) -> float:
    """Images a second: read, decoded, hashed and written as the stage does it, by a part that takes such a time."""
    order = rows if source.seeks else np.sort(rows)
    rate = _part(source, order[:FIRST], size)
    left = order[FIRST : FIRST + rows_per_shard][: max(FIRST, int(rate * seconds))]
    return _part(source, left, size) if len(left) else rate


def _part(source: Encoded, rows: np.ndarray, size: tuple[int, int]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out, labels = Path(folder), np.zeros(len(rows), np.int64)  # which they are costs nothing
        (part,) = of_parts.planned(source, rows, labels, len(rows), len(rows), size)
        of_parts.write_plan(out, [part], source, rows, labels, size)
        _, took = ingest_shard(source, out, Job(part.name, new_attempt()))
    return len(rows) / took.wall
