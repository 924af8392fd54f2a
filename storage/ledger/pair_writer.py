"""`PairWriter` makes a pair store from a user's own pairs: from another teacher, a simulation or a script."""

from __future__ import annotations

import hashlib
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from nfm.storage import layouts
from nfm.storage.errors import NoPlace, StorageError, Unusual, arguments
from nfm.storage.files.atomic import canonical_json, create_json, read_json
from nfm.storage.files.atomic import digest as digest_of
from nfm.storage.files.copies.cache import default_cache
from nfm.storage.files.paths import as_path, exists, remove
from nfm.storage.format.pair_checks import Array, RowImages, checked, scale_of
from nfm.storage.format.spec import DRAFT, SPEC, StoreSpec, check_folder, parse_name, shard_name
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.ledger.standing import WRITER, differences, made_by_a_command

_STEP = 1 << 24  # bytes of images that are read back at a time


class PairWriter:
    """Writes a pair store to `path`, a folder or a URL: `with PairWriter(path, spec) as writer: writer.write(...)`.

    Make `spec` with `StoreSpec.external`. Each draw is written in the order of its slots, from `next_slot(draw)` on.
    Records stay in memory until there are `spec.rows_per_shard` of them; then they are committed as a shard. The end of
    the block seals the store if all `draws` are complete, and raises StorageError if rows are missing.

    Committed shards stay after an error, an interrupt or a kill. A new writer with the same spec continues from there.
    A new writer with more draws than the store has adds them.

    If the spec names no source, the writer computes a digest of the images and labels in their order. Then every draw
    must have the images of draw 0, and stores of the same images and labels can be mixed as aligned ones. Raises
    StorageError if another store is at `path`.
    """

    @arguments.checked(spec=arguments.instance(StoreSpec), draws=arguments.whole(1, 1000))
    def __init__(self, path: str | Path, spec: StoreSpec, draws: int = 1) -> None:
        self.root, self.spec = as_path(path), spec
        self.draws = draws
        self._computed = not spec.source
        self._begin()
        held = seal.newest(self.root) if exists(self.root / SPEC) else None
        if held is not None and held.draws > draws:
            raise StorageError(f"{self.root}: has {held.draws} draws already; open it with as many, or with more")
        self._done = set(seal.names_of(spec, draws)) - set(seal.pending(self.root, spec, draws))
        self._open = {draw: _Draw(self._first_missing(draw)) for draw in range(draws)}
        self._digests, self._hashed = {name: hashlib.sha256() for name in self._source_fields()}, 0
        self._row_images = RowImages(spec)
        self._closed = self._warned = False

    def write(
        self, *, image: Any, noise: Any, label: Any = None, draw: int = 0,
        row: Any = None, flip: Any = None, nll: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        """Adds one record, or a batch of them along a first axis, at the next slots of a draw.

        All are numpy arrays or torch tensors. `image` has the spec's dtype and shape. `noise` is of floats of the same
        shape, with unit variance; a shard that is far from it is told as a warning. `label` is a whole number below
        `classes`. `row` (the image's row in the source, by default the slot), `flip` and `nll` may be left out; a row
        is one image, whichever records name it. Raises StorageError, which names the field and the record, before it
        keeps anything of the batch.
        """
        if self._closed:
            raise StorageError(f"{self.root}: this writer is closed; open another one to go on")
        draw = arguments.whole()("draw", draw)
        at = self._of(draw)
        given = {"image": image, "noise": noise, "label": label, "row": row, "flip": flip, "nll": nll, **others}
        with self._blaming(draw):
            arrays = checked(self.spec, given)
        count = len(arrays["image"])
        if at.slot + count > self.spec.rows:
            raise StorageError(
                f"{self.root}: draw {draw} has {self.spec.rows} rows, and this batch ends at {at.slot + count}; write "
                "fewer, another draw, or a store whose spec has more rows"
            )
        with self._blaming(draw):
            self._row_images.take(arrays)
        start = 0
        while start < count:
            slots = self.spec.slots_of(at.slot // self.spec.rows_per_shard)
            stop = min(count, start + slots.stop - at.slot)
            part = {name: array[start:stop] for name, array in arrays.items()}
            at.chunks.append(part | {"slot": np.arange(at.slot, at.slot + stop - start)})
            at.slot, start = at.slot + stop - start, stop
            if at.slot == slots.stop:
                chunks, at.chunks, at.slot = at.chunks, [], slots.start  # the state to return to if this fails
                self._commit(draw, slots.start // self.spec.rows_per_shard, chunks)
                at.slot = slots.stop

    @arguments.checked()
    def next_slot(self, draw: int = 0) -> int:
        """The slot of the next record of a draw; the number of rows if the draw is complete."""
        return self._of(draw).slot

    @arguments.checked()
    def written(self, draw: int = 0) -> int:
        """The number of records of a draw that are committed and safe."""
        self._of(draw)
        numbers = (parse_name(name) for name in self._done)
        return sum(len(self.spec.slots_of(shard)) for of, shard in numbers if of == draw)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._closed = True

    def close(self) -> None:
        """Seals the store; a `with` block does this at its end. Raises StorageError if rows are missing."""
        if self._closed:
            return
        if missing := seal.pending(self.root, self.spec, self.draws):
            raise StorageError(f"{self.root}: not sealed: {self._lacking(missing)}")
        if not exists(self.root / SPEC):
            self._hash_up_to(self.spec.shards_per_draw)
            said = {name: digest.hexdigest() for name, digest in self._digests.items()}
            self._create(self.spec.with_source(digest_of(canonical_json(_described(self.spec) | {"bytes": said}))))
        if exists(self.root / DRAFT):
            remove(self.root / DRAFT)
        seal.remove_lost_attempts(self.root, seal.seal(self.root, self.draws).shards)
        self._closed = True

    @contextmanager
    def _blaming(self, draw: int) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            raise StorageError(f"{self.root}: draw {draw}, batch at slot {self._of(draw).slot}: {error}") from error

    def _begin(self) -> None:
        """Makes the store, or checks that the existing one is the same."""
        check_folder(self.root, "write to")
        draft = self.root / DRAFT
        if not exists(self.root / SPEC):
            if not self._computed and exists(draft):
                raise StorageError(f"{self.root}: was begun with a spec without a source; open it with that spec")
            if not self._computed:
                self._create(self.spec)
            elif not create_json(draft, {"store": self.spec.to_dict()}) and exists(draft):
                self._compare(StoreSpec.from_dict(read_json(draft)), computed=True)
        if exists(self.root / SPEC):
            body = read_json(self.root / SPEC)
            if (maker := made_by_a_command(body)) is not None:
                raise NoPlace(str(self.root), f"{maker}. Write pairs of your own to another folder")
            self._compare(StoreSpec.from_dict(body), (body.get(WRITER) or {}).get("source") == "computed")

    def _create(self, spec: StoreSpec) -> None:
        kind = "computed" if self._computed else "given"
        if not create_json(self.root / SPEC, {"store": spec.to_dict(), WRITER: {"source": kind}}):
            there = StoreSpec.from_dict(read_json(self.root / SPEC))
            if there != spec:
                self._refuse(there, spec)

    def _compare(self, there: StoreSpec, computed: bool) -> None:
        if computed and self._computed:
            there = there.with_source("")
        if there != self.spec:
            self._refuse(there, self.spec)

    def _refuse(self, there: StoreSpec, here: StoreSpec) -> None:
        remedy = "Write to another folder, or open it with its own spec"
        raise NoPlace(str(self.root), f"another store is there: {differences(there, here)}. {remedy}")

    def _of(self, draw: int) -> _Draw:
        if draw not in self._open:
            raise StorageError(
                f"{self.root}: draw {draw!r}: this writer has draws 0 to {self.draws - 1}; open it with more"
            )
        return self._open[draw]

    def _first_missing(self, draw: int) -> int:
        for shard in range(self.spec.shards_per_draw):
            if shard_name(draw, shard) not in self._done:
                return self.spec.slots_of(shard).start
        return self.spec.rows

    def _commit(self, draw: int, shard: int, chunks: list[dict[str, Array]]) -> None:
        """Makes a shard durable, unless an earlier run has. A repaired store may lack shards in the middle."""
        name = shard_name(draw, shard)
        if name in self._done:
            return
        if self._computed and draw > 0:
            self._check_images(draw, shard, chunks)
        self._check_scale(name, chunks)
        attempt = f"w{secrets.token_hex(8)}"
        written = write_shard(self.root, self.spec, draw, shard, attempt, chunks)
        stands = commits.publish(self.root, written)
        if stands.attempt != attempt:
            raise StorageError(
                f"{self.root}: {name} was committed by another writer while this one wrote it; let one write at a "
                "time, and open this one again to go on after what is there"
            )
        self._done.add(name)
        if draw == 0 and self._hashed == shard:
            self._hash(chunks)

    def _check_scale(self, name: str, chunks: list[dict[str, Array]]) -> None:
        """Warns, once, of noise that is far from unit variance: of a whole shard, since single records vary."""
        if not self._warned and (told := scale_of(np.concatenate([chunk["noise"] for chunk in chunks]))):
            self._warned = True
            warnings.warn(f"{self.root}: {name}: {told}", Unusual, stacklevel=4)  # where `write` was called

    def _check_images(self, draw: int, shard: int, chunks: list[dict[str, Array]]) -> None:
        """Refuses a draw whose images are not those of draw 0, from which the digest of the source is made."""
        if shard_name(0, shard) not in self._done:
            raise StorageError(f"{self.root}: draw {draw} is ahead of draw 0; write the same slots of draw 0 first")
        first = self.spec.slots_of(shard).start
        mine = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in self._source_fields()}
        for start, part in self._read_back(0, shard):
            for name, array in part.items():
                here = mine[name][start - first : start - first + len(array)]
                differ = np.flatnonzero((here != array).reshape(len(array), -1).any(1))
                if len(differ):
                    raise StorageError(
                        f"{self.root}: slot {start + differ[0]} of draw {draw} has another {name} than in draw 0; a "
                        "draw pairs the same images anew. Where draws have images of their own, give the spec a source"
                    )

    def _hash_up_to(self, shards: int) -> None:
        while self._hashed < shards:
            self._hash([part for _, part in self._read_back(0, self._hashed)])

    def _hash(self, chunks: list[dict[str, Array]]) -> None:
        """Adds the next shard of draw 0 to the digest of the source. It does not depend on batches or shards."""
        for chunk in chunks:
            for name, digest in self._digests.items():
                digest.update(np.ascontiguousarray(chunk[name]).data)
        self._hashed += 1

    def _source_fields(self) -> list[str]:
        return [name for name in ("image", "label") if self.spec.has(name)]

    def _read_back(self, draw: int, shard: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """(first slot, image and label as stored) of a committed shard, a few records at a time."""
        name = shard_name(draw, shard)
        commit = commits.read(self.root, name)
        if commit is None:
            raise StorageError(f"{self.root}: the commit of {name} went away; who removes commits?")
        records, slots = commit.records, self.spec.slots_of(shard)
        opened = default_cache().opened(
            self.root,
            layouts.present(self.root, self.spec, commit),
            lambda paths: layouts.open_shard(self.spec, paths, records),
        )
        step = max(1, _STEP // self.spec.field("image").bytes_per_record)
        for start in range(0, records, step):
            stop = min(start + step, records)
            yield slots.start + start, {name: opened.read(name, start, stop) for name in self._source_fields()}

    def _lacking(self, missing: list[str]) -> str:
        draw, shard = parse_name(missing[0])
        lost = sum(len(chunk["slot"]) for chunk in self._of(draw).chunks)
        more = f", and {len(missing) - 1} more shards are missing" if len(missing) > 1 else ""
        dropped = f" ({lost} of them were written, but a shard is committed whole)" if lost else ""
        slots = self.spec.slots_of(shard)
        return (
            f"draw {draw} lacks its rows from slot {slots.start} to {slots.stop - 1}{dropped}{more}; what is committed "
            f"stays, and the same code goes on from next_slot({draw}) = {slots.start}"
        )


class _Draw:
    """A draw that is being written: the next slot, and the records of the incomplete shard."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.chunks: list[dict[str, Array]] = []


def _described(spec: StoreSpec) -> dict[str, Any]:
    """What identifies these images and labels, besides their bytes."""
    image = spec.field("image")
    return {
        "dtype": image.dtype,
        "shape": list(image.shape),
        "value_range": list(spec.value_range) if image.dtype == "uint8" else None,
        "rows": spec.rows,
    }
