"""The calls that read a hostile store: everything that a reader, a verifier and an exporter do with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr  # noqa: F401  imported once, before the children are forked

from nfm.storage import ImageDataset, PairStore, layouts
from nfm.storage.errors import StorageError
from nfm.storage.export import export
from nfm.storage.ledger.row_fields import RowField, row_field_names
from nfm.storage.verify import LEVELS, orphans, verify

from .sandbox import Target

_MOST = 64  # records looked at


def of(root: Path, scratch: Path) -> dict[str, Target]:
    """The targets for a folder, by name: those of a dataset or those of a pair store."""
    if (root / "dataset.json").exists() or root.name == "dataset":
        return {"dataset": lambda: dataset(root)}
    levels: dict[str, Target] = {f"verify {level}": lambda level=level: verified(root, level) for level in LEVELS}
    return {
        "read": lambda: read(root),
        "batches": lambda: batches(root),
        "fields": lambda: fields(root),
        **levels,
        "export": lambda: exported(root, scratch),
    }


def read(root: Path) -> str:
    """Gathered records are those that lie in the files, every draw; the index comes whole."""
    store = PairStore.open(root)
    slots = np.arange(min(len(store), _MOST))
    for draw in range(min(store.draws, 3)):
        got = store.gather(draw, slots[::-1])
        for name, value in _mapped(store, draw, len(slots)):
            if not np.array_equal(got[name][::-1], value, equal_nan=value.dtype.kind == "f"):
                raise AssertionError(f"gathered {name} is not what lies in the shard")
        store.index(["slot", "row", "label"], draw)
    return "data"


def _mapped(store: PairStore, draw: int, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    spec = store.spec
    parts: dict[str, list[np.ndarray]] = {}
    for number, entry in enumerate(store.manifest["shards"][draw * spec.shards_per_draw :][: spec.shards_per_draw]):
        slots = spec.slots_of(number)
        if slots.start >= rows:
            break
        paths = [store.root / file.path for file in layouts.files(spec, entry)]
        shard = layouts.open_shard(spec, paths, len(slots))
        for field in spec.fields:
            parts.setdefault(field.name, []).append(shard.read(field.name, 0, min(len(slots), rows - slots.start)))
    yield from ((name, np.concatenate(values)) for name, values in parts.items())


def batches(root: Path) -> str:
    """Batches have the spec's shapes, in full and in windowed order."""
    store = PairStore.open(root)
    for shuffle in ("full", "windowed"):
        reader = store.batches(4, seed=1, last="keep", shuffle=shuffle)  # type: ignore[arg-type]
        try:
            for _, batch in zip(range(3), reader):
                if batch.image.shape[1:] != store.spec.image_shape or batch.noise.shape[1:] != store.spec.image_shape:
                    raise AssertionError(f"images {batch.image.shape}, noise {batch.noise.shape}: {store.spec}")
                if not ((batch.slot >= 0) & (batch.slot < len(store))).all():
                    raise AssertionError(f"slots {batch.slot}")
        finally:
            reader.close()
    return "data"


def fields(root: Path) -> str:
    """Every row-scoped field gives as many values as rows are asked for."""
    for name in row_field_names(root):
        field = RowField.open(root, name)
        count = min(field.rows, _MOST)
        if field.gather(np.arange(count)).shape != (count, *field.shape):
            raise AssertionError(name)
    store = PairStore.open(root)
    for name in row_field_names(root):
        for _, batch in zip(range(2), store.batches(4, last="keep", fields=(name,))):
            if len(batch.fields[name]) != len(batch):
                raise AssertionError(name)
    return "data"


def verified(root: Path, level: str) -> str:
    """Verification always ends, with a list."""
    found = verify(root, level=level)  # type: ignore[arg-type]
    if level == "quick":
        with contextlib.suppress(StorageError):
            orphans(root)
    return "findings" if found else "clean"


def exported(root: Path, scratch: Path) -> str:
    """An export reads everything and writes only into its target."""
    export(PairStore.open(root), scratch / "exported", "blocks", "float32")
    return "data"


def dataset(root: Path) -> str:
    """Both splits of a dataset."""
    for split in ("train", "heldout"):
        data = ImageDataset.open(root, split)
        rows = np.arange(min(len(data), _MOST))
        if data.images(rows).shape != (len(rows), *data.image_shape) or len(data.keys(rows)) != len(rows):
            raise AssertionError(split)
        for _, batch in zip(range(2), data.batches(4, last="keep")):
            if batch.image.shape[1:] != data.image_shape:
                raise AssertionError(split)
    return "data"
