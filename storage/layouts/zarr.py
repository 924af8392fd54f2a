"""Layout `zarr` as an object for `LAYOUTS`: each field of a draw is one array, and a shard has one file for
each field.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from nfm.storage.errors import StorageError
from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec, parse_name
from nfm.storage.layouts import zarr_metadata, zarr_shard
from nfm.storage.layouts.tar_base import Array, Stock
from nfm.storage.layouts.zarr_shard import MappedZarr
from nfm.storage.layouts.zarr_writer import ZarrWriter

_MOST_CHUNKS = 1 << 16  # of one shard; its index is read as a whole


class Zarr:
    """See `Layout`."""

    by_field = True
    holes = False

    def writer(self, spec: StoreSpec, path: Path, name: str) -> ZarrWriter:
        """Begins to write the shard `name`."""
        records = len(spec.slots_of(parse_name(name)[1]))
        return ZarrWriter(path, spec.stored, records, spec.rows_per_shard, spec.rows_per_block)

    def mapped(self, spec: StoreSpec, paths: Sequence[Path], records: int) -> MappedZarr:
        """Maps a shard."""
        return MappedZarr(paths, spec.stored, records, spec.rows_per_shard, spec.rows_per_block)

    def offsets(self, fields: Sequence[Field], records: Array, rows: Array, rows_per_block: int) -> dict[str, Array]:
        """The offsets of rows, each field in its own file."""
        return zarr_shard.record_offsets(fields, rows, rows_per_block)

    def text(self, name: str) -> None:
        """No field is stored as text."""
        return

    def shard_bytes(self, spec: StoreSpec, records: int) -> int:
        """Size in bytes of a shard's files."""
        sizes = spec.rows_per_shard, spec.rows_per_block
        return sum(zarr_shard.shard_bytes(field, records, *sizes) for field in spec.stored)

    def check(self, spec: StoreSpec) -> None:
        """Raises StorageError unless a shard consists of whole chunks."""
        if spec.rows_per_shard % spec.rows_per_block:
            whole = -(-spec.rows_per_shard // spec.rows_per_block) * spec.rows_per_block
            raise StorageError(
                f"store spec: a shard of layout zarr is whole chunks: rows_per_shard {spec.rows_per_shard} is no "
                f"multiple of rows_per_block {spec.rows_per_block}; use {whole}, or other blocks"
            )
        if spec.rows_per_shard // spec.rows_per_block > _MOST_CHUNKS:
            raise StorageError(f"store spec: more than {_MOST_CHUNKS} chunks a shard; raise rows_per_block")

    def rows_per_block(self, spec: StoreSpec) -> int:
        """The largest block, up to the spec's own, that divides a shard evenly."""
        sizes = range(1, min(spec.rows_per_block, spec.rows_per_shard) + 1)
        return max(rows for rows in sizes if spec.rows_per_shard % rows == 0)

    def placed(self, spec: StoreSpec, name: str) -> list[str]:
        """Where stock readers look for the files of a shard."""
        return [zarr_metadata.chunk_path(field, *parse_name(name)) for field in spec.stored]

    def metadata(self, spec: StoreSpec, draws: int) -> dict[str, bytes]:
        """The zarr.json files."""
        return zarr_metadata.documents(spec, draws)

    def stock_arrays(self, spec: StoreSpec, files: Sequence[Path], draw: int, shard: int) -> Stock:
        """(field, records) by zarr. It reads links in a temporary folder, because files may be unsealed or copies."""
        import zarr

        slots = spec.slots_of(shard)
        with TemporaryDirectory(prefix="nfm-verify-") as scratch:
            for field, file in zip(spec.stored, files):
                folder = f"d{draw:03d}/{field.name}"
                link = Path(scratch) / zarr_metadata.chunk_path(field, draw, shard)
                link.parent.mkdir(parents=True)
                link.symlink_to(file.resolve())
                about = self.metadata(spec, draw + 1)[f"{folder}/zarr.json"]
                (Path(scratch) / folder / "zarr.json").write_bytes(about)
                array = zarr.open_array(Path(scratch) / folder, mode="r")
                for start in range(slots.start, slots.stop, spec.rows_per_block):
                    yield field.name, np.asarray(array[start : min(start + spec.rows_per_block, slots.stop)])

    def check_stock_reader(self) -> None:
        """Raises StorageError if zarr is not installed."""
        if find_spec("zarr") is None:
            raise StorageError("the deep level reads with the package zarr, which is not here; install nfm-pairs[zarr]")
