"""Operations on a finished store: export to another layout or codec, and add a field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.base import Unfit
from nfm.stages.couplings.rows import slot_is_row
from nfm.stages.display.units import megabytes
from nfm.storage import PairStore
from nfm.storage.export import Progress, export
from nfm.storage.format.codecs import CODECS as CODECS
from nfm.storage.layouts import LAYOUTS as LAYOUTS
from nfm.storage.ledger.row_fields import RowField, write_row_field

CHUNK_BYTES = 16 << 20


def run(
    where: str | Path,
    target: str | Path,
    layout: str | None,
    codec: str | None,
    generation: int | None,
    progress: Progress,
) -> list[str]:
    """Exports a store, by default in its own layout and codec. Returns lines for the user."""
    store = PairStore.open(where, generation)
    layout, codec = layout or store.spec.layout, codec or store.spec.codec
    exported = export(store, target, layout, codec, progress)
    before, after, pairs = store.sealed.bytes, exported.bytes, exported.records
    said = [
        f"{pairs:,} pairs, {layout} {codec}: {megabytes(after)}, {after / pairs:,.0f} bytes a pair "
        f"({store.spec.layout} {store.spec.codec}: {before / pairs:,.0f})",
        _loss(store.spec.codec, codec, exported.body, pairs * int(np.prod(store.spec.image_shape))),
    ]
    return said


def _loss(before: str, after: str, manifest: Mapping[str, Any], values: int) -> str:
    exported = manifest["exported"]
    if not exported.get("rms_error"):
        return f"the noise is exactly that of the source ({before} to {after})"
    clipped = manifest.get("clipped", 0)
    return (
        f"the noise is rounded from {before} to {after}: RMS error {exported['rms_error']:.3g}, largest "
        f"{exported['max_error']:.3g} over {exported['measured']:,} pairs; {clipped:,} of {values:,} values clipped"
    )


def add_field(where: str | Path, name: str, file: Path) -> RowField:
    """Adds a row-scoped field from an .npy file with one value for each source row. Never unpickles."""
    store = PairStore.open(where)
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if "pickle" in str(error) or "Python objects" in str(error):  # numpy advises to unpickle it
            why = "it holds Python objects, or is no .npy file; make numbers of them, array.astype(numpy.float32)"
            raise Unfit(f"{file}: {why}, and write these with numpy.save") from error
        raise Unfit(f"{file}: not an .npy file of numbers ({error}); write it with numpy.save") from error
    if not isinstance(values, np.ndarray) or not values.ndim:
        raise Unfit(f"{file}: one array [rows, ...] is needed; write it with numpy.save")
    rows = store.spec.rows
    if not slot_is_row(store.spec):
        # The source may have more rows than a draw has slots. The rows that the pairs name must exist.
        named = int(max(part.as_py() for part in store.index(["row"])["row"].combine_chunks().unique()))
        rows = max(len(values), named + 1)
    if len(values) != rows:
        raise Unfit(f"{file}: {len(values):,} rows, the store's source has {rows:,}: one value a row, in its order")
    return write_row_field(store.root, name, _chunks(values), values.shape[1:], values.dtype.name, rows)


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, CHUNK_BYTES // max(values[:1].nbytes, 1))
    for start in range(0, len(values), step):
        yield np.asarray(values[start : start + step])
