"""Copies a store into another layout or codec. Every shard is checked, converted and committed; the manifest comes
last.

If an export is killed and run again, it continues with the shards that are not committed yet. The name of an attempt
begins with the digest of its source shard, so a target never mixes two stores.
"""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nfm.storage import layouts as layouts
from nfm.storage.errors import CorruptShard, MissingShard, Misused, NoPlace, StorageError
from nfm.storage.errors.arguments import WrongArgument, checked, instance, one_of
from nfm.storage.files.atomic import HashingFile, create_json, hash_file, read_json
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import as_path, inside, is_remote, size_of
from nfm.storage.files.small_files import plain
from nfm.storage.format import codecs
from nfm.storage.format.codecs import CODECS
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.index import read_index
from nfm.storage.format.spec import SPEC, StoreSpec, check_folder
from nfm.storage.layouts.seeded import Origins
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.generation import Generation
from nfm.storage.ledger.row_fields import FIELDS, RowField, publish_row_field, row_field_names
from nfm.storage.ledger.shard_list import Entry
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.ledger.standing import MEND, differences, other_inputs
from nfm.storage.store import PairStore

T = TypeVar("T")
Progress = Callable[[int, int, int], None]  # pairs done, pairs in all, bytes read so far by this call
_CHUNK_BYTES = 16 << 20
_COPY_BYTES = 4 << 20
_INDEX_COLUMNS = ("row", "flip", "group", "nll", "label")
_CARRIED = ("config", "versions", "git_commit")  # copied from the manifest of the source: how it was made


@checked(spec=instance(StoreSpec), layout=one_of(layouts.LAYOUTS), codec=one_of(CODECS))
def converted(spec: StoreSpec, layout: str, codec: str) -> StoreSpec:
    """The recipe of the same pairs in another layout and codec. Raises StorageError if the two do not fit together."""
    noise = next(field for field in pair_fields(spec.image_shape, codec) if field.role == "noise")
    fields = tuple(noise if field.role == "noise" else field for field in spec.fields)
    rows_per_block = layouts.LAYOUTS[layout].rows_per_block(spec)
    step = spec.noise_step if codec == spec.codec else None
    return dataclasses.replace(
        spec, layout=layout, codec=codec, fields=fields, noise_step=step, rows_per_block=rows_per_block
    )


@checked(source=instance(PairStore))
def export(
    source: PairStore,
    target: str | Path,
    layout: str = "blocks",
    codec: str = "float16",
    progress: Progress = lambda done, total, read: None,
    threads: int | None = None,
) -> Generation:
    """Writes the pinned generation of `source` to `target`, a folder or URL. Returns the target's generation.

    The entry `exported` of its manifest says which store it was made from. If the codec rounds differently, it has
    `rms_error` and `max_error` over the `measured` pairs that this call converted. `clipped` in the manifest counts
    clipped values. Raises StorageError if the target is another store, CorruptShard if a shard of the source is not
    what was committed.
    """
    root, spec = as_path(target), converted(source.spec, layout, codec)
    _check_made(source, spec)
    _begin(source, root, spec)
    entries = source.sealed.shards
    done = commits.committed(root, source.draws)
    for entry in entries:
        found = done.get(entry.name)
        if found is not None and not found.attempt.startswith(_origin(entry)):
            raise NoPlace(str(root), f"{entry.name} was exported from other pairs; choose another folder")
    pending = [entry for entry in entries if entry.name not in done]
    job = _Conversion(source, root, spec, source.sealed.records, progress)
    job.run(pending, threads or os.cpu_count() or 1)
    if job.loss.unknown:  # an earlier run converted every shard and was killed before sealing
        job.measure(entries[0])
    _copy_row_fields(source, root)
    exported = {
        "content_digest": source.content_digest,
        "generation": source.generation,
        "layout": source.spec.layout,
        "codec": source.spec.codec,
        **job.loss.figures(),
    }
    carried = {key: source.manifest[key] for key in _CARRIED if key in source.manifest}
    holes = {hole.name: hole.reason for hole in source.sealed.excluded}
    sealed = seal.seal(root, source.draws, holes, **carried, inputs=_inputs(source), exported=exported)
    seal.remove_lost_attempts(root, sealed.shards)
    return sealed


def _begin(source: PairStore, root: Path, spec: StoreSpec) -> None:
    """Writes spec.json of the target, or checks that the one there belongs to this export.

    It has no `stage`, because the pipeline did not make it.
    """
    if source.excluded and not layouts.of(spec).holes:
        raise Misused(
            f"{source.root}: {len(source.excluded)} shards are missing, and the arrays of layout {spec.layout} can "
            "have no holes; complete the store first, or export it in layout blocks or samples"
        )
    if _within(root, source.root):
        raise NoPlace(str(root), f"inside the store that is exported, {source.root}; export into a folder of its own")
    mine = {"store": spec.to_dict(), "inputs": _inputs(source), "exported": {"order_source": source.spec.source}}
    check_folder(root, "export into")
    if (encoding := read_json(source.root / SPEC).get("encoding")) is not None:
        mine["encoding"] = encoding  # has the batch shape; an audit needs it to encode a sample again
    if not create_json(root / SPEC, mine):
        there = read_json(root / SPEC)
        there.pop("digest", None)
        kind = "" if "exported" in there else "it was not exported"
        inputs = other_inputs(there.get("inputs"), mine["inputs"])
        if told := "; ".join(filter(None, [kind, differences(StoreSpec.from_dict(there), spec), inputs])):
            raise NoPlace(str(root), f"another store is there: {told}. Export into a new or empty folder")


def _check_made(source: PairStore, spec: StoreSpec) -> None:
    """Raises StorageError, before anything is written, for a codec that cannot make the noise of the first record."""
    if CODECS[spec.codec].made:
        slots = source.slots(0)[:1]
        noise = codecs.unpack(source.gather(0, slots)["noise"], source.noise_step)
        try:
            Origins(spec, 0, int(slots[0]) // spec.rows_per_shard)(slots, noise)
        except StorageError as error:
            raise WrongArgument("codec", f"{spec.codec} does not fit {source.root}: {error}") from error


def _within(path: Path, folder: Path) -> bool:
    """Whether a place is that folder or lies below it, after links are resolved."""
    if is_remote(path) or is_remote(folder):
        return f"{path}/".startswith(f"{str(folder).rstrip('/')}/")
    return path.resolve().is_relative_to(folder.resolve())


def _inputs(source: PairStore) -> dict[str, Any]:
    return dict(read_json(source.root / SPEC).get("inputs") or {})


def _origin(entry: Entry) -> str:
    return f"x{entry.payload.sha256[:16]}-"


class _Conversion:
    """Converts the shards of one export on several threads. numpy, hashing and the disk release Python's lock."""

    def __init__(self, source: PairStore, root: Path, spec: StoreSpec, total: int, progress: Progress) -> None:
        self.source, self.root, self.spec = source, root, spec
        self.loss = _Loss(source.spec, spec)
        self._total, self._progress = total, progress
        self._stop = threading.Event()

    def run(self, pending: Sequence[Entry], threads: int) -> None:
        """Converts and commits the shards. After an error or an interrupt it waits until every thread has stopped."""
        done, read = self._total - sum(entry.records for entry in pending), 0
        self._progress(done, self._total, read)
        with closing(parallel(self._convert, pending, threads, stop=self._stop)) as written:
            for entry in written:
                done, read = done + entry.records, read + entry.payload.bytes
                self._progress(done, self._total, read)

    def measure(self, entry: Entry) -> None:
        """Measures the loss of one shard without writing it."""
        for _ in self._records(entry):
            pass

    def _convert(self, entry: Entry) -> Entry:
        source, name = self.source, entry.name
        commit = commits.read(source.root, name)
        if commit is None:
            raise MissingShard(f"{commits.commit_path(source.root, name)}: the commit is missing; run `nfm audit`")
        attempt = _origin(entry) + secrets.token_hex(4)
        written = write_shard(self.root, self.spec, commit.draw, commit.shard, attempt, self._records(entry))
        how = {key: getattr(commit, key) for key in ("precision", "batch_size", "threads", "versions", "device")}
        commits.publish(self.root, dataclasses.replace(written, **how))
        return entry

    def _records(self, entry: Entry) -> Iterator[dict[str, np.ndarray]]:
        spec = self.source.spec
        shard = self._opened(layouts.files(spec, entry), lambda paths: layouts.open_shard(spec, paths, entry.records))
        index = self._opened([entry.index], lambda paths: read_index(paths[0], [*_INDEX_COLUMNS]))
        columns = {name: index[name].to_numpy(zero_copy_only=False) for name in _INDEX_COLUMNS}
        step = max(1, _CHUNK_BYTES // sum(field.bytes_per_record for field in spec.fields))
        for start in range(0, shard.records, step):
            if self._stop.is_set():
                raise InterruptedError("the export was stopped")
            stop = min(start + step, shard.records)
            chunk = {name: values[start:stop] for name, values in columns.items()}
            chunk |= {field.name: shard.read(field.name, start, stop) for field in spec.fields}
            if spec.noise_step is not None:
                chunk["noise"] = codecs.unpack(chunk["noise"], spec.noise_step)
            self.loss.add(chunk["noise"])
            yield chunk

    def _opened(self, files: Sequence[StoredFile], opener: Callable[[list[Path]], T]) -> T:
        """Checks the bytes of the files, downloads them first if the source is a URL, and calls `opener` with them."""
        if not self.source.remote:
            for file in files:
                _check(self.source.root, file)
        return self.source.cache.opened(self.source.root, files, opener)


class _Loss:
    """How much the noise changes in another codec. Nothing is measured if it cannot change."""

    def __init__(self, before: StoreSpec, after: StoreSpec) -> None:
        self._codec, self._step = after.codec, after.noise_step
        same = (before.codec, before.noise_step) == (after.codec, after.noise_step)
        self._possible = after.codec != "float32" and not CODECS[after.codec].made and not same
        self._lock = threading.Lock()
        self._squares, self._values, self._pairs, self._max = 0.0, 0, 0, 0.0

    def add(self, noise: np.ndarray) -> None:
        if not self._possible:
            return
        error = codecs.unpack(codecs.pack(noise, self._codec, self._step)[0], self._step) - noise
        flat = error.reshape(-1)
        squares, most = float(np.dot(flat, flat)), float(np.abs(flat).max(initial=0.0))
        with self._lock:
            self._squares += squares
            self._values += flat.size
            self._pairs += len(noise)
            self._max = max(self._max, most)

    @property
    def unknown(self) -> bool:
        """Whether values can change but none was measured."""
        return self._possible and not self._values

    def figures(self) -> dict[str, Any]:
        """The error over the measured pairs; empty if no value can change."""
        if not self._possible or not self._values:
            return {}
        return {"rms_error": math.sqrt(self._squares / self._values), "max_error": self._max, "measured": self._pairs}


def _check(root: Path, file: StoredFile) -> None:
    path = inside(root, file.path)
    if size_of(path) is None:
        raise MissingShard(f"{path}: missing; {MEND}; then the same export goes on")
    if size_of(path) != file.bytes or hash_file(path)[0] != file.sha256:
        raise CorruptShard(f"{path}: not the bytes that were committed; {MEND}; then the same export goes on")


def _copy_row_fields(source: PairStore, root: Path) -> None:
    for name in row_field_names(source.root):
        field = RowField.open(source.root, name, source.cache)
        for part in field.files:
            if size_of(root / part.path) == part.bytes:
                continue  # written by an earlier run that was killed; a file gets its name only when it is complete
            with field.opened(part, plain) as file, HashingFile(root / part.path) as out:
                while piece := file.read(_COPY_BYTES):
                    out.write(piece)
                if out.sha256 != part.sha256:
                    raise CorruptShard(f"{source.root / part.path}: not the bytes that were written; restore it")
        publish_row_field(root / FIELDS / name, field.body)
