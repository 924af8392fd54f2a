"""`encode_shard`: from a shard's descriptor to its commit, wherever it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.stage import StageError
from nfm.storage import ImageDataset, atomic, commits, philox
from nfm.storage.commits import Commit
from nfm.storage.schema import StoreSpec, read_spec, shard_name

if TYPE_CHECKING:
    from nfm.stages.executors import ShardJob
    from nfm.stages.training import Precision
    from nfm.trainers.couplings import Coupling


@dataclass(frozen=True)
class Setup:
    """What an encoder needs to begin: folders of the store and its inputs, and how to compute."""

    store: str
    data: str
    teacher: str | None
    teacher_sha256: str | None
    batch_size: int
    precision: Precision
    device: str
    threads: int


class Encoder:
    """Encodes shards of one store: source images mapped, coupling (and its teacher) loaded once."""

    def __init__(self, setup: Setup):
        import torch

        self.setup = setup
        self.store = Path(setup.store)
        self.spec = read_spec(self.store)
        self.source = ImageDataset.open(setup.data, "train")
        if setup.device == "cpu":
            torch.set_num_threads(setup.threads)
        self.coupling = load_coupling(self.spec, setup)

    def encode_shard(self, job: ShardJob, stopping: Callable[[], bool] = lambda: False) -> Commit:
        """Encode one shard and commit it; returns the commit that stands, ours or an earlier one.

        Raises InterruptedError when `stopping()` turns true between batches: nothing is published then.
        """
        started = time.monotonic()
        name = shard_name(job.draw, job.shard)
        written = commits.write_shard(
            self.store, self.spec, job.draw, job.shard, job.attempt, self._records(job, stopping)
        )
        commit = Commit(
            name=name,
            draw=job.draw,
            shard=job.shard,
            attempt=job.attempt,
            payload=written.payload.path.name,
            payload_sha256=written.payload.sha256,
            payload_bytes=written.payload.bytes,
            index=written.index.path.name,
            index_sha256=written.index.sha256,
            index_bytes=written.index.bytes,
            records=written.records,
            keys_digest=written.keys_digest,
            moments=written.moments,
            precision=self.setup.precision,
            batch_size=self.setup.batch_size,
            threads=self.setup.threads,
            seconds=round(time.monotonic() - started, 3),
            versions=_versions(),
            device=_device_kind(self.setup.device),
        )
        return commits.publish(self.store, commit)

    def _records(self, job: ShardJob, stopping: Callable[[], bool]) -> Iterator[dict[str, np.ndarray]]:
        slots = self.spec.slots_of(job.shard)
        for start in range(slots.start, slots.stop, self.setup.batch_size):
            if stopping():
                raise InterruptedError
            yield self.encode_batch(job.draw, range(start, min(start + self.setup.batch_size, slots.stop)))

    def encode_batch(self, draw: int, slots: range) -> dict[str, np.ndarray]:
        """The records of these slots; z is computed at the full batch size whatever their number."""
        import torch

        rows = np.arange(slots.start, slots.stop)  # a slot is a row of the source, shuffled at ingestion
        flip = philox.flips(self.spec.seed, draw, rows) if self.spec.flips else np.zeros(len(rows), bool)
        image, label = self.source.images(rows), self.source.labels(rows)
        image = np.where(flip[:, None, None, None], image[..., ::-1], image)
        eps = philox.normals(self.spec.seed, draw, rows, image[0].size).reshape(image.shape)
        padding = self.setup.batch_size - len(rows)
        inputs = [torch.from_numpy(_pad(array, padding)) for array in (self.source.to_float(image), label, eps)]
        noise, nll = self.coupling(*inputs)
        return {
            "image": image,
            "noise": noise[: len(rows)].float().cpu().numpy(),
            "label": label,
            "slot": rows,
            "row": rows,
            "flip": flip,
            "nll": nll[: len(rows)].float().cpu().numpy(),
        }


def load_coupling(spec: StoreSpec, setup: Setup) -> Coupling:
    """The coupling that the store's recipe names. Raises StageError when the teacher's weights are not its own."""
    from nfm.trainers.couplings import NFM, Independent

    if spec.coupling == "independent":
        return Independent()
    from nfm.stages import teacher
    from nfm.stages.training import WEIGHTS, autocast_dtype

    folder = Path(setup.teacher or "")
    if atomic.hash_file(folder / WEIGHTS)[0] != setup.teacher_sha256:
        raise StageError(
            f"{folder / WEIGHTS}: not the weights that its manifest lists; run `nfm audit` on that teacher, then "
            "restore it or train it again"
        )
    model, facts = teacher.load(folder, setup.device)
    return NFM(model, facts["eta"], facts["sigma_f"], setup.device, autocast_dtype(setup.precision))


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
