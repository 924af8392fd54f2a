"""`encode_shard`: from a shard's descriptor to its commit, wherever it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfm.stages.coupling import as_teacher, load_coupling
from nfm.stages.executors import ShardJob, Timing
from nfm.stages.memory import free_memory, is_out_of_memory
from nfm.stages.overlap import Ahead, Stopwatch, running
from nfm.stages.stage import StageError
from nfm.stages.training import Precision, pick_device
from nfm.storage import ImageDataset, commits, philox
from nfm.storage.commits import Commit
from nfm.storage.schema import read_spec

REFERENCE_IMAGES = 4


@dataclass(frozen=True)
class Setup:
    """What an encoder needs to begin: folders of the store and its inputs, and how to compute.

    `device` "auto" is chosen where the encoder runs. `batch_size` is the shape that every batch is padded to.
    """

    store: str
    data: str
    teacher: str | None
    teacher_sha256: str | None
    batch_size: int
    precision: Precision
    device: str
    threads: int
    compile: bool = False


class Sources(NamedTuple):
    """What slots are encoded from: image as stored, already flipped; label, -1 for none; flip; eps'; all over n."""

    slots: np.ndarray
    image: np.ndarray
    label: np.ndarray
    flip: np.ndarray
    eps: np.ndarray


class Encoder:
    """Encodes shards of one store: source images mapped, coupling (and its teacher) loaded once.

    Whoever uses one sets the threads: an actor for good, anybody else within `with threads(setup.threads)`.
    `batch_size` is the one that fits into memory, which may be less than the setup's; of the last shard, `timing` says
    where its time went, and `noise_error`, of a store's very first shard, how far z is from a float64 reference (RMS).
    """

    def __init__(self, setup: Setup):
        self.setup = replace(setup, device=pick_device(setup.device))
        self.store = Path(setup.store)
        self.spec = read_spec(self.store)
        self.source = ImageDataset.open(setup.data, "train")
        self.coupling = load_coupling(
            self.spec, setup.teacher, setup.teacher_sha256, self.setup.device, setup.precision, setup.compile
        )
        self.batch_size = setup.batch_size
        self.timing = Timing()
        self.noise_error: float | None = None

    def encode_shard(self, job: ShardJob, stopping: Callable[[], bool] = lambda: False) -> Commit:
        """Encode one shard and commit it; returns the commit that stands, ours or an earlier one.

        Reading, encoding and writing overlap, a thread each. Raises InterruptedError when `stopping()` turns true
        between batches: nothing is published then.
        """
        read, encode, wait, wall = Stopwatch(), Stopwatch(), Stopwatch(), Stopwatch()
        sources = Ahead(read.over(self._read(job)))
        records = Ahead(self._encode(job, sources, encode, stopping))
        with wall, running(records, sources):
            written = commits.write_shard(self.store, self.spec, job.draw, job.shard, job.attempt, wait.over(records))
            commit = commits.publish(self.store, written.commit(
                precision=self.setup.precision,
                batch_size=self.batch_size,
                threads=self.setup.threads,
                versions=_versions(),
                device=_device_kind(self.setup.device),
                noise_error=self.noise_error,
            ))  # fmt: skip
        self.timing = Timing(wall.seconds, read.seconds, encode.seconds, wall.seconds - wait.seconds)
        return commit

    def _read(self, job: ShardJob) -> Iterator[Sources]:
        slots = self.spec.slots_of(job.shard)
        for start in range(slots.start, slots.stop, self.setup.batch_size):
            yield self._sources(job.draw, np.arange(start, min(start + self.setup.batch_size, slots.stop)))

    def _encode(
        self, job: ShardJob, sources: Iterator[Sources], busy: Stopwatch, stopping: Callable[[], bool]
    ) -> Iterator[dict[str, np.ndarray]]:
        import torch

        self.noise_error = None
        for source in sources:
            if stopping():
                raise InterruptedError
            with busy:
                records = self._records(source)
                if (job.draw, job.shard, source.slots[0]) == (0, 0, 0):  # once a store: float64 is slow
                    self.noise_error = self._against_reference(source, records["noise"])
                if self.spec.codec == "float16":  # torch rounds to the same bits as numpy, several times as fast
                    records["noise"] = torch.from_numpy(records["noise"]).half().numpy()
            yield records

    def encode_slots(self, draw: int, slots: np.ndarray) -> dict[str, np.ndarray]:
        """The records of at most `batch_size` slots; z is computed at the full batch size whatever their number."""
        return self._records(self._sources(draw, slots))

    def _records(self, source: Sources) -> dict[str, np.ndarray]:
        noise, nll = self._noise(source)
        return {
            "image": source.image,
            "noise": noise,
            "label": source.label,
            "slot": source.slots,
            "row": source.slots,
            "flip": source.flip,
            "nll": nll,
        }

    def _noise(self, source: Sources) -> tuple[np.ndarray, np.ndarray]:
        """(z, nll) of the slots. A batch that does not fit into memory is halved, for all that follow as well."""
        while True:
            size = self.batch_size
            try:
                parts = [
                    self._coupled(source, slice(start, start + size), size)
                    for start in range(0, len(source.slots), size)
                ]
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size = size // 2
            else:
                noise, nll = zip(*parts)
                return np.concatenate(noise), np.concatenate(nll)
            free_memory(self.setup.device)

    def _coupled(self, source: Sources, part: slice, size: int) -> tuple[np.ndarray, np.ndarray]:
        """z and nll of a part of the slots, padded to `size` rows: a fixed shape keeps each row's bits the same."""
        import torch

        count = len(source.slots[part])
        arrays = (self.source.to_float(source.image[part]), source.label[part], source.eps[part])
        noise, nll = self.coupling(*(torch.from_numpy(_pad(array, size - count)) for array in arrays))
        return noise[:count].float().cpu().numpy(), nll[:count].float().cpu().numpy()

    def _against_reference(self, source: Sources, noise: np.ndarray) -> float | None:
        """RMS of z of the first images minus the same computed in float64; None where that does not fit into memory."""
        import torch

        from nfm.stages.probe import noise_error

        first = slice(0, REFERENCE_IMAGES)
        arrays = (self.source.to_float(source.image[first]), source.label[first], source.eps[first], noise[first])
        teacher = as_teacher(self.coupling)
        if teacher is None:
            return None
        try:
            return noise_error(teacher.model, teacher.eta, teacher.sigma_f, *map(torch.from_numpy, arrays))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def decode_error(self, draw: int, slots: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """RMS over each record of decode(sigma_f z) minus x + eta eps', in float32; `noise` is z [n, C, H, W]."""
        import torch

        teacher = as_teacher(self.coupling)
        if teacher is None:
            raise StageError(f"{self.store}: coupling {self.spec.coupling!r} has no teacher to decode with")
        source = self._sources(draw, slots)
        noised = torch.from_numpy(self.source.to_float(source.image) + teacher.eta * source.eps).to(teacher.device)
        labels = torch.from_numpy(source.label).to(teacher.device)
        with torch.inference_mode():
            back = teacher.model.decode(torch.from_numpy(noise).to(teacher.device) * teacher.sigma_f, labels)
        return (back - noised).flatten(1).square().mean(1).sqrt().cpu().numpy()

    def _sources(self, draw: int, slots: np.ndarray) -> Sources:
        """Slots are rows of the shuffled source."""
        flip = philox.flips(self.spec.seed, draw, slots) if self.spec.flips else np.zeros(len(slots), bool)
        image = self.source.images(slots)
        image = np.where(flip[:, None, None, None], image[..., ::-1], image)
        eps = philox.normals(self.spec.seed, draw, slots, image[0].size).reshape(image.shape)
        return Sources(slots, image, self.source.labels(slots), flip, eps)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many threads for a while: bits depend on the number, this process's own work included."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pad(array: np.ndarray, count: int) -> np.ndarray:
    """`count` repetitions of the last row behind the array: a fixed shape keeps each row's bits the same."""
    return np.concatenate([array, np.repeat(array[-1:], count, axis=0)]) if count else array


def _versions() -> dict[str, Any]:
    import torch

    return {"torch": str(torch.__version__), "numpy": np.__version__}


def _device_kind(device: str) -> str:
    """The kind of device, never the host: a GPU's model name or the CPU's instruction set."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu {os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"
