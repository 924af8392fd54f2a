"""Layout `samples`: a tar sample holds one record, as is usual for WebDataset. Each field is still one strided array.

The members of a sample are KEY.FIELD.npy in the order of the fields, and KEY.cls for the label (decimal, of fixed
width). KEY is draw and slot: d000-000000123. The slot is not stored, as it follows from the position. All samples have
the same size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec, parse_name, shard_name
from nfm.storage.layouts.mapped import Mapped, Shard, corrupt, map_file
from nfm.storage.layouts.npy import NPY_HEADER, npy_header
from nfm.storage.layouts.tar_base import (
    TAR_END,
    TAR_HEADER,
    Array,
    Stock,
    TarLayout,
    TarWriter,
    Text,
    member_bytes,
    stock_array,
    stock_members,
    stored,
    strides,
    tar_header,
)

LABEL_BYTES = 20  # the longest int64
_DIGITS = 9  # digits of the slot in a key
_SLOT_AT = len("d000-")
_CHECKSUM_AT = 148  # position of ustar's checksum: six octal digits
_PIECE = 8 << 20  # bytes built at a time


@dataclass(frozen=True)
class _Member:
    field: Field
    text: bool  # whether it is the label, in decimal
    header: int  # where its tar header begins in the sample
    data: int
    bytes: int


def _members(fields: Sequence[Field]) -> tuple[list[_Member], int]:
    """The members of a sample, and its size in bytes."""
    members, at = [], 0
    for field in fields:
        if field.name == "slot":
            continue
        text = field.name == "label"
        head = 0 if text else NPY_HEADER
        size = LABEL_BYTES if text else field.bytes_per_record
        members.append(_Member(field, text, at, at + TAR_HEADER + head, size))
        at += member_bytes(head + size)
    return members, at


def shard_bytes(fields: Sequence[Field], records: int) -> int:
    """Size in bytes of a shard of `records` records."""
    return records * _members(fields)[1] + TAR_END


def record_offsets(fields: Sequence[Field], rows: Array) -> dict[str, Array]:
    """The byte offsets of rows in a shard: int64 [n] for each field. The slot has none, because it is not stored."""
    members, size = _members(fields)
    return {member.field.name: rows * size + member.data for member in members}


def _template(fields: Sequence[Field], draw: int) -> npt.NDArray[np.uint8]:
    """The sample of slot 0 of a draw with zeros as data. Only the digits of the slot and the checksums differ later."""
    members, size = _members(fields)
    sample = bytearray(size)
    for member in members:
        name = f"d{draw:03d}-{0:0{_DIGITS}d}.{'cls' if member.text else f'{member.field.name}.npy'}"
        head = b"" if member.text else npy_header(member.field.name, stored(member.field), member.field.shape)
        head = tar_header(name, len(head) + member.bytes) + head
        sample[member.header : member.header + len(head)] = head
    return np.frombuffer(bytes(sample), np.uint8)


def _number(samples: npt.NDArray[np.uint8], members: Sequence[_Member], slots: Array) -> None:
    """Writes the digits of the slots into the headers of samples [n, bytes] that are copies of the template."""
    digits = slots[:, None] // 10 ** np.arange(_DIGITS - 1, -1, -1) % 10
    for member in members:
        name = member.header + _SLOT_AT
        at = member.header + _CHECKSUM_AT
        base = int(bytes(samples[0, at : at + 6]), 8) - int(samples[0, name : name + _DIGITS].sum() - 48 * _DIGITS)
        sums = base + digits.sum(axis=1)
        samples[:, name : name + _DIGITS] = digits + 48
        samples[:, at : at + 6] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + 48


def label_text(labels: Array) -> npt.NDArray[np.uint8]:
    """Labels int64 [n] in decimal: uint8 [n, LABEL_BYTES], padded with leading blanks."""
    text = b"".join(b"%*d" % (LABEL_BYTES, label) for label in labels.tolist())
    return np.frombuffer(text, np.uint8).reshape(-1, LABEL_BYTES)


def parse_labels(text: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Labels int64 [n] from the result of `label_text`. Raises CorruptShard for anything else."""
    digits = np.where((text >= 48) & (text < 58), text, 48).astype(np.int64) - 48
    powers = 10 ** np.arange(LABEL_BYTES - 1, -1, -1, dtype=np.uint64)
    values = digits @ powers.astype(np.int64)
    labels = np.where((text == ord("-")).any(axis=1), -values, values)
    if not np.array_equal(label_text(labels), text):
        raise CorruptShard("a label is no decimal number of fixed width; truncated or altered, run `nfm audit`")
    return labels


class SampleWriter(TarWriter):
    """Writes one shard of consecutive slots from `first_slot` on. Otherwise as `ShardWriter`."""

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int, draw: int, first_slot: int) -> None:
        template = _template(fields, draw)
        rows = min(records, max(1, _PIECE // len(template)))
        super().__init__(path, fields, records, rows)
        self._members = _members(fields)[0]
        self._samples = np.tile(template, (rows, 1))
        self._next = first_slot

    def _write(self, piece: Mapping[str, Array]) -> None:
        slots = piece["slot"]
        if not np.array_equal(slots, np.arange(self._next, self._next + len(slots))):
            raise StorageError(f"{self.path}: slots {slots[:3]}... where {self._next} was next: they are not stored")
        self._next += len(slots)
        samples = self._samples[: len(slots)]
        _number(samples, self._members, slots)
        for member in self._members:
            data = piece[member.field.name]
            data = label_text(data) if member.text else data.reshape(len(slots), -1).view(np.uint8)
            samples[:, member.data : member.data + member.bytes] = data
        self._file.write(samples.reshape(-1).data)


class MappedSamples(Shard):
    """A shard as arrays, mapped into memory. Opening checks the size, and the headers of the first and the last record.

    Raises MissingShard or CorruptShard.
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], records: int) -> None:
        super().__init__(path, fields, records)
        members, size = _members(self.fields)
        buffer = map_file(self.path, shard_bytes(self.fields, records), f"{records} records")
        memory = np.frombuffer(buffer, np.uint8)
        self.maps = [Mapped.of(self.path, buffer)]
        self.addresses = {member.field.name: memory.ctypes.data for member in members}
        self.first_slot = self._check(memory[: records * size].reshape(records, size), members)
        self._arrays: dict[str, Array] = {}
        for member in members:
            shape, dtype = member.field.shape, stored(member.field)
            inner: tuple[int, ...] = strides(member.field)
            if member.text:
                shape, dtype, inner = (LABEL_BYTES,), np.dtype(np.uint8), (1,)
            self._arrays[member.field.name] = np.ndarray((records, *shape), dtype, buffer, member.data, (size, *inner))

    def _read(self, name: str, start: int, stop: int) -> Array:
        if name == "slot":
            return np.arange(self.first_slot + start, self.first_slot + stop)
        part = self._arrays[name][start:stop]
        return parse_labels(part) if name == "label" else part.copy()

    def _check(self, samples: npt.NDArray[np.uint8], members: Sequence[_Member]) -> int:
        key = bytes(samples[0, : _SLOT_AT + _DIGITS])
        match = re.fullmatch(rb"d(\d{3})-(\d{9})", key)
        if match is None:
            raise corrupt(self.path, f"no sample begins at byte 0 ({key!r})")
        expected = np.tile(_template(self.fields, int(match[1])), (2, 1))
        first, last = int(match[2]), int(match[2]) + self.records - 1
        _number(expected, members, np.array([first, last]))
        for row, slot, wanted in ((0, first, expected[0]), (self.records - 1, last, expected[1])):
            for member in members:
                found = samples[row, member.header : member.data]
                if not np.array_equal(found, wanted[member.header : member.data]):
                    at = row * samples.shape[1] + member.header
                    raise corrupt(self.path, f"the member at byte {at} is not {member.field} of slot {slot}")
        return first


class Samples(TarLayout):
    """The layout as an object for `LAYOUTS`, see `Layout`."""

    def writer(self, spec: StoreSpec, path: Path, name: str) -> SampleWriter:
        """Begins to write the shard `name`."""
        draw, shard = parse_name(name)
        slots = spec.slots_of(shard)
        return SampleWriter(path, spec.stored, len(slots), draw, slots.start)

    def mapped(self, spec: StoreSpec, paths: Sequence[Path], records: int) -> MappedSamples:
        """Maps a shard."""
        return MappedSamples(paths[0], spec.stored, records)

    def offsets(self, fields: Sequence[Field], records: Array, rows: Array, rows_per_block: int) -> dict[str, Array]:
        """The offsets of rows, see `record_offsets`."""
        return record_offsets(fields, rows)

    def text(self, name: str) -> Text | None:
        """Labels are decimal numbers."""
        return Text(LABEL_BYTES, parse_labels) if name == "label" else None

    def shard_bytes(self, spec: StoreSpec, records: int) -> int:
        """Size in bytes of a shard's files."""
        return shard_bytes(spec.stored, records)

    def stock_arrays(self, spec: StoreSpec, files: Sequence[Path], draw: int, shard: int) -> Stock:
        """(field, records) by tarfile and numpy."""
        slot, names = -1, {field.name for field in spec.stored}
        for name, data in stock_members(files[0]):
            match = re.fullmatch(rf"d{draw:03d}-(\d{{9}})\.(?:(\w+)\.npy|cls)", name)
            if match is None or (match[2] or "label") not in names:
                raise CorruptShard(f"the member {name!r} is no record of {shard_name(draw, shard)}")
            if int(match[1]) != slot:
                slot = int(match[1])
                yield "slot", np.array([slot])
            yield (match[2], stock_array(data)[None]) if match[2] else ("label", np.array([int(data)]))
