"""`encode_shard`: from a shard's descriptor to its commit, wherever it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.stage import StageError
from nfm.storage import ImageDataset, atomic, commits, philox
from nfm.storage.commits import Commit
from nfm.storage.schema import StoreSpec, read_spec

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
    """Encodes shards of one store: source images mapped, coupling (and its teacher) loaded once.

    Whoever uses one sets the threads: an actor for good, anybody else within `with threads(setup.threads)`.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.store = Path(setup.store)
        self.spec = read_spec(self.store)
        self.source = ImageDataset.open(setup.data, "train")
        self.coupling = load_coupling(self.spec, setup)

    def encode_shard(self, job: ShardJob, stopping: Callable[[], bool] = lambda: False) -> Commit:
        """Encode one shard and commit it; returns the commit that stands, ours or an earlier one.

        Raises InterruptedError when `stopping()` turns true between batches: nothing is published then.
        """
        written = commits.write_shard(
            self.store, self.spec, job.draw, job.shard, job.attempt, self._records(job, stopping)
        )
        commit = written.commit(
            precision=self.setup.precision,
            batch_size=self.setup.batch_size,
            threads=self.setup.threads,
            versions=_versions(),
            device=_device_kind(self.setup.device),
        )
        return commits.publish(self.store, commit)

    def _records(self, job: ShardJob, stopping: Callable[[], bool]) -> Iterator[dict[str, np.ndarray]]:
        import torch

        slots = self.spec.slots_of(job.shard)
        for start in range(slots.start, slots.stop, self.setup.batch_size):
            if stopping():
                raise InterruptedError
            records = self.encode_slots(job.draw, np.arange(start, min(start + self.setup.batch_size, slots.stop)))
            if self.spec.codec == "float16":  # torch rounds to the same bits as numpy, several times as fast
                records["noise"] = torch.from_numpy(records["noise"]).half().numpy()
            yield records

    def encode_slots(self, draw: int, slots: np.ndarray) -> dict[str, np.ndarray]:
        """The records of at most `batch_size` slots; z is computed at the full batch size whatever their number."""
        import torch

        image, label, flip, eps = self._sources(draw, slots)
        padding = self.setup.batch_size - len(slots)
        inputs = [torch.from_numpy(_pad(array, padding)) for array in (self.source.to_float(image), label, eps)]
        noise, nll = self.coupling(*inputs)
        return {
            "image": image,
            "noise": noise[: len(slots)].float().cpu().numpy(),
            "label": label,
            "slot": slots,
            "row": slots,
            "flip": flip,
            "nll": nll[: len(slots)].float().cpu().numpy(),
        }

    def decode_error(self, draw: int, slots: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """RMS over each record of decode(sigma_f z) minus x + eta eps', in float32; `noise` is z [n, C, H, W]."""
        import torch

        from nfm.trainers.couplings import NFM

        if not isinstance(self.coupling, NFM):
            raise StageError(f"{self.store}: coupling {self.spec.coupling!r} has no teacher to decode with")
        image, label, _, eps = self._sources(draw, slots)
        noised = torch.from_numpy(self.source.to_float(image) + self.coupling.eta * eps).to(self.setup.device)
        labels = torch.from_numpy(label).to(self.setup.device)
        with torch.inference_mode():
            back = self.coupling.model.decode(torch.from_numpy(noise).to(labels.device) * self.coupling.sigma_f, labels)
        return (back - noised).flatten(1).square().mean(1).sqrt().cpu().numpy()

    def _sources(self, draw: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(image as stored, already flipped; label, -1 for none; flip; eps') of slots, rows of the shuffled source."""
        flip = philox.flips(self.spec.seed, draw, slots) if self.spec.flips else np.zeros(len(slots), bool)
        image = self.source.images(slots)
        image = np.where(flip[:, None, None, None], image[..., ::-1], image)
        eps = philox.normals(self.spec.seed, draw, slots, image[0].size).reshape(image.shape)
        return image, self.source.labels(slots), flip, eps


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
