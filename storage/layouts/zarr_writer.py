"""Writes one shard of layout `zarr`: a Zarr v3 shard file for each field, as a stream, hashed on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from nfm.storage.errors import StorageError
from nfm.storage.files.durable import HashingFile, StoredFile
from nfm.storage.files.paths import as_path, is_remote, remove
from nfm.storage.format.spec import Field
from nfm.storage.layouts.tar_base import Array, Blocker, stored
from nfm.storage.layouts.zarr_shard import CRC, crc32c, index_of


class ZarrWriter:
    """Writes the files of one shard as `folder`/FIELD. They get their names when all records are durable.

    As a context manager it closes on a clean exit and leaves nothing behind after an error. Raises StorageError as
    `Blocker` does, and if the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        fields: Sequence[Field],
        records: int,
        rows_per_shard: int,
        rows_per_block: int,
    ) -> None:
        self.path = as_path(folder)
        self.fields = tuple(fields)
        self.payloads: list[StoredFile] = []
        self._rows = (rows_per_shard, rows_per_block)
        self._blocker = Blocker(self.path, self.fields, records, rows_per_block)
        self._chunks: dict[str, list[int]] = {field.name: [] for field in self.fields}  # sizes in bytes
        self._files: dict[str, HashingFile] = {}
        try:
            for field in self.fields:
                self._files[field.name] = HashingFile(self.path / field.name)
        except StorageError:
            self.discard()
            raise

    @property
    def written(self) -> int:
        """The number of records so far."""
        return self._blocker.taken

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Adds n records: an array [n, *shape] of the right dtype for every field, and no other names."""
        for block in self._blocker.add(arrays):
            self._write(block)

    def close(self) -> list[StoredFile]:
        """Publishes the files, in the order of the fields.

        If records are missing it raises StorageError and leaves nothing.
        """
        if not self.payloads:
            try:
                for block in self._blocker.rest():
                    self._write(block)
                for name, file in self._files.items():
                    file.write(index_of(self._chunks[name], self._rows[0] // self._rows[1]))
                    file.publish()
            except StorageError:
                self.discard()
                raise
            self.payloads = [file.stored for file in self._files.values()]
        return self.payloads

    def discard(self) -> None:
        """Removes what this attempt has written, published or not."""
        for file in self._files.values():
            file.discard()
            if file.published:
                remove(file.path)
        remove_folder(self.path)

    def __enter__(self) -> ZarrWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _write(self, block: Mapping[str, Array]) -> None:
        for field in self.fields:
            data = block[field.name]
            if len(data) < self._rows[1]:
                padding = np.zeros((self._rows[1] - len(data), *field.shape), stored(field))
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
