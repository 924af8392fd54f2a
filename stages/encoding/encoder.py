"""`encode_shard` turns the description of a shard into its commit, on any machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.couplings.custom import importable
from nfm.stages.couplings.facts import facts_of
from nfm.stages.encoding import reference
from nfm.stages.encoding import slots as of_slots
from nfm.stages.encoding.coupling import load_coupling, of_shard
from nfm.stages.encoding.setup import Setup, mirrored_here
from nfm.stages.encoding.slots import Found, Sources, mirrored
from nfm.stages.executors.jobs import Job, Timing, Unit
from nfm.stages.executors.overlap import Ahead, Stopwatch, running
from nfm.stages.trained.devices.machine import free_memory, is_out_of_memory, pick_device
from nfm.stages.trained.devices.precision import check_precision
from nfm.storage import ImageDataset
from nfm.storage.files.paths import as_path
from nfm.storage.format.spec import parse_name, read_spec
from nfm.storage.ledger import commits
from nfm.storage.ledger.commits import Commit
from nfm.storage.ledger.shard_writer import write_shard

if TYPE_CHECKING:
    from nfm.trainers.couplings.coupling import Coupling

Records = dict[str, np.ndarray]


class Encoder:
    """Encodes shards of one store. Source images are mapped, and the coupling (with its teacher) is loaded once.

    The caller sets the threads: an actor once, others within `with threads(setup.threads)`. `batch_size` fits into
    memory, and may be smaller than the setup's. `timing` says where the time of the last shard went. `noise_error` is
    the RMS error of z against a float64 reference, measured on the first shard of a store.
    """

    def __init__(self, setup: Setup):
        self.setup = replace(mirrored_here(setup), device=pick_device(setup.device))
        check_precision(self.setup.device, setup.precision)
        self.store = as_path(setup.store)
        self.spec = read_spec(self.store)
        self.source = ImageDataset.open(self.setup.data, "train")
        with importable(Path(setup.beside or Path.cwd())):
            self.coupling = load_coupling(self.spec, self.source, self.setup)
        self.batch_size = setup.batch_size
        self.timing = Timing()
        self.noise_error: float | None = None
        self._shard: tuple[tuple[int, int], Records] | None = None  # the last one that `encode_slots` completed

    def encode_shard(self, job: Job, stopping: Callable[[], bool] = lambda: False) -> Commit:
        """Encodes one shard and commits it. Returns the valid commit, which may be an earlier one.

        Reading, encoding and writing overlap, in one thread each. Raises InterruptedError if `stopping()` becomes true
        between batches; then nothing is published.
        """
        read, encode, wait, wall = Stopwatch(), Stopwatch(), Stopwatch(), Stopwatch()
        draw, shard = parse_name(job.name)
        sources = Ahead(read.over(self._read(draw, shard)))
        records = Ahead(self._encode(draw, shard, sources, encode, stopping))
        with wall, running(records, sources):
            written = write_shard(self.store, self.spec, draw, shard, job.attempt, wait.over(records))
            commit = commits.publish(self.store, replace(
                written,
                precision=self.setup.precision,
                batch_size=self.batch_size,
                threads=self.setup.threads,
                versions=_versions(),
                device=_device_kind(self.setup.device),
                noise_error=self.noise_error,
            ))  # fmt: skip
        self.timing = Timing(wall.seconds, read.seconds, encode.seconds, wall.seconds - wait.seconds)
        return commit

    def _read(self, draw: int, shard: int) -> Iterator[Sources]:
        slots = self.spec.slots_of(shard)
        for start in range(slots.start, slots.stop, self.setup.batch_size):
            yield self._sources(draw, np.arange(start, min(start + self.setup.batch_size, slots.stop)))

    def _encode(
        self, draw: int, shard: int, sources: Iterator[Sources], busy: Stopwatch, stopping: Callable[[], bool]
    ) -> Iterator[Records]:
        import torch

        self.noise_error = None
        for source in sources if self.coupling.scope == "record" else _whole(sources, stopping):
            if stopping():
                raise InterruptedError
            with busy:
                records = self._records(draw, source)
                # only once for a store, because float64 is slow
                if (draw, shard, source.slots[0]) == (0, 0, 0):
                    self.noise_error = reference.against_reference(self.coupling, self.source, source, records["noise"])
                    if facts_of(self.spec.coupling).code:
                        reference.check_repeatable(records["noise"], self._records(draw, source)["noise"])
                if self.spec.codec == "float16":  # torch gives the same bits as numpy, several times as fast
                    records["noise"] = torch.from_numpy(records["noise"]).half().numpy()
            yield from _batches(records, self.setup.batch_size)

    def encode_slots(self, draw: int, slots: np.ndarray) -> Records:
        """The records of at most `batch_size` slots.

        They do not depend on the number of slots. z is computed at the full batch size, or with its whole shard if the
        coupling needs the shard.
        """
        if self.coupling.scope == "record":
            return self._records(draw, self._sources(draw, slots))
        out: Records = {}
        shards = slots // self.spec.rows_per_shard
        for shard in np.unique(shards).tolist():
            whole, mine = self._shard_records(draw, shard), shards == shard
            for name, values in whole.items():
                part = out.setdefault(name, np.empty((len(slots), *values.shape[1:]), values.dtype))
                part[mine] = values[slots[mine] - self.spec.slots_of(shard).start]
        return out

    def _shard_records(self, draw: int, shard: int) -> Records:
        if self._shard is None or self._shard[0] != (draw, shard):
            source = of_slots.joined(list(self._read(draw, shard)))
            self._shard = (draw, shard), self._records(draw, source)
        return self._shard[1]

    def _records(self, draw: int, source: Sources) -> Records:
        if self.coupling.scope == "record":
            found = self._in_batches(source)
        else:
            shard = int(source.slots[0]) // self.spec.rows_per_shard
            found = self._coupled(of_shard(self.coupling, draw, shard), source, slice(None), len(source.slots))
        return of_slots.records(self.source, source, found)

    def _in_batches(self, source: Sources) -> Found:
        """The pairs of the slots. If a batch does not fit into memory, it and all later ones are halved."""
        while True:
            size = self.batch_size
            try:
                starts = range(0, len(source.slots), size)
                parts = [self._coupled(self.coupling, source, slice(at, at + size), size) for at in starts]
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size = size // 2
            else:
                return of_slots.together(parts)
            free_memory(self.setup.device)

    def _coupled(self, coupling: Coupling, source: Sources, part: slice, size: int) -> Found:
        """The pairs of some slots, padded to `size` rows: with a fixed shape the bits of each row stay the same.

        A coupling that chooses the image knows only images that are not flipped. So a pair is flipped as a whole: the
        noise is mirrored on the way in and again on the way out.
        """
        import torch

        count, flip = len(source.slots[part]), source.flip[part]
        turned = facts_of(self.spec.coupling).image != "row" and bool(flip.any())
        eps = mirrored(source.eps[part], flip) if turned else source.eps[part]
        arrays = (self.source.to_float(source.image[part]), source.label[part], eps)
        pairs = coupling(*(torch.from_numpy(_pad(array, size - count)) for array in arrays))
        found = of_slots.found(pairs, count)
        return found._replace(noise=mirrored(found.noise, flip)) if turned else found

    def decode_error(self, draw: int, slots: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """RMS of each record of decode(sigma_f z) minus x + eta eps', in float32. `noise` is z [n, C, H, W]."""
        source = self._sources(draw, slots)
        return reference.decode_error(self.coupling, self.source, source, noise, self.store)

    def _sources(self, draw: int, slots: np.ndarray) -> Sources:
        return of_slots.read(self.spec, self.source, draw, slots)


def unit(setup: Setup) -> Unit:
    """For executors: encodes one shard of the store after another."""
    encoder = Encoder(setup)
    return lambda job, stopping: (encoder.encode_shard(job, stopping), encoder.timing)


def _whole(sources: Iterator[Sources], stopping: Callable[[], bool]) -> Iterator[Sources]:
    """All parts of a shard, joined. Raises InterruptedError if it is stopped while they are read."""
    parts = []
    for source in sources:
        if stopping():
            raise InterruptedError
        parts.append(source)
    if parts:  # none if reading was cancelled
        yield of_slots.joined(parts)


def _batches(records: Records, size: int) -> Iterator[Records]:
    """The records, at most `size` at a time."""
    for start in range(0, len(records["slot"]), size):
        yield {name: values[start : start + size] for name, values in records.items()}


def _pad(array: np.ndarray, count: int) -> np.ndarray:
    """The array, followed by `count` copies of its last row."""
    return np.concatenate([array, np.repeat(array[-1:], count, axis=0)]) if count else array


def _versions() -> dict[str, Any]:
    import torch

    return {"torch": str(torch.__version__), "numpy": np.__version__}


def _device_kind(device: str) -> str:
    """The kind of device, never the host: the model name of a GPU or the instruction set of a CPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu {os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"
