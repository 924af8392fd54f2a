"""Writes one shard of layout `zarr`: a Zarr v3 shard file for each field, as a stream, hashed on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nfm.storage.errors import StorageError
from nfm.storage.files.durable import HashingFile, StoredFile
from nfm.storage.files.paths import is_remote, remove
from nfm.storage.format.fields import Field
from nfm.storage.layouts.tar_base import Array, BlockWriter, stored
from nfm.storage.layouts.zarr_shard import CRC, crc32c, index_of


class ZarrWriter(BlockWriter):
    """Writes the files of one shard as `folder`/FIELD. They get their names when all records are durable."""

    def __init__(
        self, folder: str | Path, fields: Sequence[Field], records: int, rows_per_shard: int, rows_per_block: int
    ) -> None:
        super().__init__(folder, fields, records, rows_per_block)
        self._shape = (rows_per_shard, rows_per_block)
        self._chunks: dict[str, list[int]] = {field.name: [] for field in self.fields}  # sizes in bytes
        self._files: dict[str, HashingFile] = {}
        try:
            for field in self.fields:
                self._files[field.name] = HashingFile(self.path / field.name)
        except StorageError:
            self.discard()
            raise

    def _finish(self) -> list[StoredFile]:
        for name, file in self._files.items():
            file.write(index_of(self._chunks[name], self._shape[0] // self._shape[1]))
            file.close()
        return [file.stored for file in self._files.values()]

    def discard(self) -> None:
        """Removes what this attempt has written, published or not."""
        for file in self._files.values():
            file.discard()
            if file.published:
                remove(file.path)
        remove_folder(self.path)

    def _write(self, block: Mapping[str, Array]) -> None:
        for field in self.fields:
            data = block[field.name]
            if len(data) < self._shape[1]:
                padding = np.zeros((self._shape[1] - len(data), *field.shape), stored(field))
                data = np.concatenate([data, padding])
            chunk = data.reshape(-1).view(np.uint8)
            self._chunks[field.name].append(len(chunk) + CRC)
            file = self._files[field.name]
            file.write(chunk.data)
            file.write(crc32c(chunk))


def remove_folder(folder: Path) -> None:
    """Removes the empty folder of a local attempt. Object stores have no folders."""
    if not is_remote(folder):
        with contextlib.suppress(OSError):
            folder.rmdir()
