"""One unit of work of the latents stage: from the rows of the data to the commit of one shard of latents.

A shard is written under the name of its attempt, then its commit is created, if nobody else has done so. The stage
places committed shards at the end. So a killed worker leaves nothing that counts, and two on one shard leave one.
Workers of an artifact in a bucket bring its VAE to their machines, and their shards to the bucket.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nfm.stages.base import StageError
from nfm.stages.couplings import custom
from nfm.stages.data import records
from nfm.stages.executors.jobs import Job, Timing, Unit, Work
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import Precision
from nfm.stages.trained.foreign import vae
from nfm.storage import ImageDataset
from nfm.storage.dataset.shards import shard_writer
from nfm.storage.errors import by
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path, exists, is_remote
from nfm.storage.format import philox

SPLITS = ("train", "heldout")
ATTEMPTS = "attempts"
DTYPE = "float16"
_VAE = f"{ATTEMPTS}/vae.json"  # in a bucket: the files that workers need of the VAE, with their digests
_NAME = re.compile(r"(train|heldout)-s(\d{5})", re.ASCII)


@dataclass(frozen=True)
class Commit:
    """The record that makes a shard exist: its file's SHA-256 and size, the sums of its values and of their squares."""

    name: str
    attempt: str
    sha256: str
    bytes: int
    records: int
    total: float
    squares: float
    seconds: float

    @property
    def file(self) -> str:
        """The path of the file before it is placed, relative to the artifact."""
        return f"{ATTEMPTS}/{self.name}.{self.attempt}.tar"


def name_of(split: str, number: int) -> str:
    return f"{split}-s{number:05d}"


def place_of(name: str) -> str:
    """The path of a shard in the finished artifact."""
    split, number = _parts(name)
    return f"{split}/s{number:05d}.tar"


def _parts(name: str) -> tuple[str, int]:
    found = _NAME.fullmatch(name)
    assert found is not None, name
    return found[1], int(found[2])


class Images:
    """The rows of latents as images of the data: with mirrors, row n + r is row r of n training images, mirrored."""

    def __init__(self, data: str | Path, facts: vae.VaeFacts) -> None:
        self.splits = {split: ImageDataset.open(data, split) for split in SPLITS}
        self.facts = facts

    def rows(self, split: str) -> int:
        return len(self.splits[split]) * (2 if self._mirrored(split) else 1)

    def rows_of(self, name: str, rows_per_shard: int) -> range:
        """The rows of a shard."""
        split, number = _parts(name)
        return range(number * rows_per_shard, min((number + 1) * rows_per_shard, self.rows(split)))

    def images(self, split: str, rows: np.ndarray) -> np.ndarray:
        """float32 [n, C, H, W] in [-1, 1]."""
        source = self.splits[split]
        found = source.to_float(source.images(rows % len(source)))
        mirrored = rows >= len(source)
        found[mirrored] = found[mirrored][..., ::-1]
        return found

    def labels(self, split: str, rows: np.ndarray) -> np.ndarray:
        return self.splits[split].labels(rows % len(self.splits[split]))

    def keys(self, split: str, rows: np.ndarray) -> list[str]:
        source = self.splits[split]
        return [
            key if row < len(source) else f"{key}{MIRRORED}" for key, row in zip(source.keys(rows % len(source)), rows)
        ]

    def captions(self, split: str, rows: np.ndarray) -> list[str | None] | None:
        source = self.splits[split]
        return source.captions(rows % len(source)) if source.captioned else None

    def _mirrored(self, split: str) -> bool:
        return self.facts.mirrors and split == "train"


MIRRORED = "#mirrored"  # ends the key of a mirrored image


@dataclass(frozen=True, kw_only=True)
class LatentWork(Work):
    """Where the data and the artifact, `store`, are; `beside` is where modules of the user are looked for too."""

    unit: ClassVar[str] = "nfm.stages.data.latents.shards:unit"
    section: ClassVar[str] = "latents"
    memory: ClassVar[str] = "latents.batch_size or latents.workers"
    data: str
    rows_per_shard: int
    beside: str


def unit(work: LatentWork) -> Unit:
    """Encodes a shard of one artifact of latents."""
    out = as_path(work.store)
    with custom.importable(Path(work.beside)), mirror.beside(work.store) as folder:
        if is_remote(out):
            for file in atomic.read_json(out / _VAE)["files"]:
                mirror.fetch(out, folder, file)
        encoder = LatentEncoder(folder, mirror.here(work.data), work.device)

    def encode(job: Job, stopping: Callable[[], bool]) -> tuple[Commit, Timing]:
        began = time.perf_counter()
        with mirror.beside(work.store) as folder:
            commit = encoder.encode_shard(out, job.name, work.rows_per_shard, job.attempt, folder, stopping)
        return commit, Timing(wall := time.perf_counter() - began, encode=wall)

    return encode


def share_vae(shared: Path, here: Path, files: Mapping[str, tuple[str, int]]) -> None:
    """Brings what workers need of the VAE from `here` to a bucket, by path with SHA-256 and size, unless it is there.

    On disks that all see it is there.
    """
    if not is_remote(shared):
        return
    listed = {"files": [{"path": path, "sha256": sha256, "bytes": size} for path, (sha256, size) in files.items()]}
    if not exists(shared / _VAE) or atomic.read_json(shared / _VAE)["files"] != listed["files"]:
        mirror.push(shared, here, files, lambda: None)  # the same for all who make this artifact
        atomic.write_json(shared / _VAE, listed)


class LatentEncoder:
    """Encodes shards of one artifact of latents; the VAE, from its copy in the artifact's folder, is loaded once.

    The code of a VAE that is its user's own function runs here.
    """

    def __init__(self, folder: Path, data: str | Path, device: str) -> None:
        self.vae, self.facts = vae.of_artifact(folder, pick_device(device))
        self.images = Images(data, self.facts)

    def compute_in(self, precision: Precision) -> None:
        """Computes in another precision than the artifact's own."""
        self.vae = replace(self.vae, precision=precision)

    def latents(self, split: str, rows: np.ndarray) -> np.ndarray:
        """The latents of at most `batch_size` rows, float32 [n, c, h, w] before they are rounded to float16.

        Every batch is padded to that size, so that a row's latent does not depend on the rows beside it.
        """
        import torch

        facts, count = self.facts, len(rows)
        padded = np.concatenate([rows, np.repeat(rows[-1:], facts.batch_size - count)])
        eps = None
        if facts.posterior == "sample":
            values = int(np.prod(facts.latent_shape))
            found = philox.normals(facts.seed, 0, padded, values, purpose=f"latents/{split}")
            eps = torch.from_numpy(found.reshape(-1, *facts.latent_shape))
        made = self.vae.encode(torch.from_numpy(self.images.images(split, padded)), eps)
        if (shape := tuple(made.shape[1:])) != tuple(facts.latent_shape):
            raise StageError(
                f"latents.vae: encode gave {by(shape)} for {split} images, and {by(facts.latent_shape)} in its trial; "
                "give all latents one shape"
            )
        return made[:count].float().cpu().numpy()

    def encode_shard(
        self, out: Path, name: str, rows_per_shard: int, attempt: str, here: Path,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Commit:  # fmt: skip
        """Encodes a shard and commits it in `out`. Returns the valid commit, which may be an earlier one.

        Its file is written in the folder `here`, which is `out` unless that is in a bucket.
        Raises InterruptedError if `stopping()` becomes true between batches; then nothing is left behind. Raises
        StageError for latents that are not finite.
        """
        began = time.monotonic()
        (split, number), size = _parts(name), self.facts.batch_size
        rows = np.asarray(self.images.rows_of(name, rows_per_shard))
        path = here / ATTEMPTS / f"{name}.{attempt}.tar"
        total = squares = 0.0
        with shard_writer(path, split, number, len(rows), self.facts.latent_shape, DTYPE) as writer:
            for start in range(0, len(rows), size):
                if stopping():
                    raise InterruptedError
                chosen = rows[start : start + size]
                latents = self._finite(split, chosen, self.latents(split, chosen))
                writer.append({"image": latents, "label": self.images.labels(split, chosen)})
                total += float(latents.sum(dtype=np.float64))
                squares += float(np.square(latents, dtype=np.float64).sum())
            (payload,) = writer.close()
        seconds = round(time.monotonic() - began, 3)
        return records.publish(
            out, Commit(name, attempt, payload.sha256, payload.bytes, len(rows), total, squares, seconds), here
        )

    def _finite(self, split: str, rows: np.ndarray, latents: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = latents.astype(DTYPE)
        bad = np.flatnonzero(~np.isfinite(stored).reshape(len(rows), -1).all(1))
        if len(bad):
            key = self.images.keys(split, rows[bad[:1]])[0]
            if not np.isfinite(latents[bad[0]]).all() and self.facts.precision == "float32":
                raise StageError(
                    f"latents.vae: encode gave NaN or an infinity for {split} image {key!r}, in float32; mend the VAE, "
                    "or leave that image out of the data"
                )
            raise StageError(
                f"the latent of {split} image {key!r} has values that are not finite in float16 "
                f'(latents.precision = "{self.facts.precision}", scale {self.facts.scale:g}); use '
                f"{'' if self.facts.precision == 'float32' else 'float32, or '}a smaller latents.scale"
            )
        return stored


def moments(commits: Mapping[str, Commit], values: int) -> dict[str, Any]:
    """Mean and standard deviation of all stored values, from the sums in the commits; a latent has `values`."""
    count = sum(commit.records for commit in commits.values()) * values
    mean = sum(commit.total for commit in commits.values()) / count
    variance = max(sum(commit.squares for commit in commits.values()) / count - mean**2, 0.0)
    return {"mean": mean, "std": variance**0.5}
