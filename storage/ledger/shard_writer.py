"""Writes one shard: its payload, in the store's layout and codec, and its index part."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nfm.storage import layouts
from nfm.storage.errors import StorageError
from nfm.storage.files.paths import as_path
from nfm.storage.format import codecs
from nfm.storage.format.codecs import CODECS
from nfm.storage.format.commit import ATTEMPT, Commit
from nfm.storage.format.fields import ORIGIN
from nfm.storage.format.index import index_rows, keys_digest, write_index
from nfm.storage.format.moments import MomentSums
from nfm.storage.format.spec import StoreSpec, shard_name
from nfm.storage.layouts.seeded import Origins
from nfm.storage.layouts.tar_base import Array
from nfm.storage.ledger import commits


def write_shard(
    root: str | Path,
    spec: StoreSpec,
    draw: int,
    shard: int,
    attempt: str,
    records: Iterable[Mapping[str, Array]],
) -> Commit:
    """Writes the payload and the index part of one shard, both durable on return. The result is not published yet.

    Each item of `records` has arrays over n records: every field of the spec (the noise in float32; it is stored in the
    spec's codec, or where it comes from), `slot` counting through `spec.slots_of(shard)`, and optionally `row`
    (default: the slot), `flip`, `group` and `nll`. Raises StorageError for wrong slots, shapes and types, for noise
    that is not finite or that the codec cannot make again, and if the disk is full; then nothing is left behind.
    Moments are of the noise as stored.
    """
    if not re.fullmatch(ATTEMPT, attempt):
        raise StorageError(f"attempt {attempt!r}: use letters, digits, - and _ only, it becomes part of file names")
    begin = time.monotonic()
    root, name, slots = as_path(root), shard_name(draw, shard), spec.slots_of(shard)
    earlier = commits.read(root, name)
    if earlier is not None and earlier.attempt == attempt:
        raise StorageError(f"{root}: {name} is committed under attempt {attempt!r}; use a new attempt's name")
    payload, index = layouts.payload_name(spec, name, attempt), f"index/{name}.{attempt}.parquet"
    sums, rows, clipped = MomentSums(), [], 0
    origins = Origins(spec, draw, shard) if CODECS[spec.codec].made else None
    with layouts.writer(spec, root, name, attempt) as writer:
        for chunk in records:
            start = slots.start + writer.written
            arrays, beyond = _fields_of(writer.path, spec, chunk, start)
            sums.add(arrays["noise"], spec.noise_step)
            if sums.nonfinite:
                raise StorageError(
                    f"{writer.path}: {sums.nonfinite} values of the noise are not finite from slot {start} on; "
                    "check what made them, or use codec float32 if they are too large for another one"
                )
            if origins is not None:
                arrays[ORIGIN] = _origins_of(writer.path, origins, arrays)
            writer.append({field.name: arrays[field.name] for field in spec.stored})
            rows.append(index_rows(draw, {**chunk, **arrays}))
            clipped += beyond
        whole, parts = layouts.closed(writer, payload)
    try:
        written = write_index(root / index, rows)
    except StorageError:
        layouts.remove(root, whole, parts)
        raise
    return Commit(
        name=name,
        attempt=attempt,
        payload=whole,
        index=dataclasses.replace(written, path=index),
        records=len(slots),
        keys_digest=keys_digest(draw, slots),
        moments=sums.result(),
        clipped=clipped,
        parts=parts,
        seconds=time.monotonic() - begin,
    )


def _origins_of(path: Path, origins: Origins, arrays: Mapping[str, Array]) -> Array:
    try:
        return origins(arrays["slot"], arrays["noise"])
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from error


def _fields_of(path: Path, spec: StoreSpec, chunk: Mapping[str, Array], start: int) -> tuple[dict[str, Array], int]:
    """(the records as stored, the number of clipped noise values)."""
    missing = [field.name for field in spec.fields if field.name not in chunk]
    if missing:
        raise StorageError(f"{path}: the records lack {', '.join(missing)}; the spec lists them as fields")
    arrays = {field.name: np.asarray(chunk[field.name]) for field in spec.fields}
    try:
        arrays["noise"], clipped = codecs.pack(arrays["noise"], spec.codec, spec.noise_step)
    except StorageError as error:
        raise StorageError(f"{path}: {error} from slot {start} on; check what made them") from error
    slot = arrays["slot"]
    if not np.array_equal(slot, np.arange(start, start + len(slot))):
        raise StorageError(f"{path}: slots {slot[:3]}... where {start} was next; write them in the order of the slots")
    return arrays, clipped
