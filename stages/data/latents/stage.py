"""The latents stage: encodes every image of the data with a VAE, into a data set of latents of the same form.

What trains reads it as it reads data. Labels, keys and captions are those of the data, in its order; mirrored training
images are rows of their own behind all others. What needs pixels again finds the VAE here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages import executors
from nfm.stages.base import Inputs, Reporter, Result, Stopped
from nfm.stages.data import records
from nfm.stages.data.latents import shards
from nfm.stages.data.latents.config import LatentsConfig
from nfm.stages.data.latents.planned import (
    cost,
    device_here,
    external,
    fits,
    needs,
    room,
    told,
    tried,
    tries,
    vae_of,
)
from nfm.stages.data.latents.shards import ATTEMPTS, Commit, Images, LatentEncoder, LatentWork, place_of
from nfm.stages.executors import EXECUTORS, slurm
from nfm.stages.executors.jobs import Outcome, jobs_of
from nfm.stages.executors.outcomes import lacking_pieces, settled
from nfm.stages.trained.foreign import vae
from nfm.stages.trained.foreign.vae import VaeFacts
from nfm.storage import ImageDataset
from nfm.storage.dataset.record import DATASET
from nfm.storage.dataset.writer import DatasetWriter
from nfm.storage.errors import by
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import exists, is_remote, remove, remove_below, several, size_of

__all__ = [
    "NAME",
    "VERSION",
    "cost",
    "external",
    "fits",
    "make_pieces",
    "needs",
    "pieces_left",
    "room",
    "run",
    "told",
    "tries",
]

NAME = "latents"
VERSION = 1
WORKING = (ATTEMPTS, records.FOLDER, "failed")
PIECES = "shards of latents"
COMPARED = 16  # images that are decoded again, to tell how much the VAE loses
UNUSUAL = 2.0  # a standard deviation that is so many times off 1 is told


def run(config: LatentsConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Encodes the shards that have no commit yet, then places them and writes what describes them."""
    named = vae_of(config)
    vae.announce(named, report.say)
    shared = records.shared_place(out, config.executor)
    kept, facts = _begin(config, inputs["data"], out, shared)
    images = Images(inputs["data"], facts)
    names = _names(images, config)
    done = _done(shared, names)
    total = sum(images.rows(split) for split in shards.SPLITS)
    finished = sum(commit.records for commit in done.values())
    if done and len(done) < len(names):
        report.say(f"{len(done)} of {len(names)} shards are committed already")
    report.progress(finished, total, "images")
    if lacking := [name for name in names if name not in done]:
        if (executor := EXECUTORS[config.executor]).later:
            raise lacking_pieces(shared, lacking, len(names), PIECES, executor.again(NAME))
        done |= _encode(config, inputs["data"], shared, lacking, finished, total, report)
    if is_remote(shared):
        for left in (records.FOLDER, *shards.SPLITS):  # of a run that encoded here, and was stopped
            remove_below(out / left)
        records.bring(shared, out, list(done.values()), report)
    encoder = LatentEncoder(out, inputs["data"], device_here(config))
    error = _reconstruction(encoder)
    return _finish(config, inputs["data"], out, {name: done[name] for name in names}, encoder, kept, error, report)


def _encode(
    config: LatentsConfig, data: Path, out: Path, names: list[str], finished: int, total: int, report: Reporter
) -> dict[str, Commit]:
    """The commits of these shards, encoded where the config says. Raises Stopped, or StageError if some failed."""
    outcomes = executors.run(config, _work(config, data, out), jobs_of(names), report)
    done: dict[str, Commit] = {}
    failed = settled(
        out, outcomes, report, finished, total, "images",
        also=lambda outcome: done.update({outcome.job.name: outcome.commit}),
    )  # fmt: skip
    if failed:
        again = EXECUTORS[config.executor].again(NAME)
        raise lacking_pieces(out, [outcome.job.name for outcome in failed], len(names), PIECES, again)
    if len(done) < len(names):
        raise Stopped
    return done


def _work(config: LatentsConfig, data: Path, out: Path) -> LatentWork:
    return LatentWork(
        store=str(out if is_remote(out) else out.resolve()), data=mirror.origin(data), beside=str(Path.cwd()),
        rows_per_shard=config.rows_per_shard, device=config.device, threads=config.threads,
    )  # fmt: skip


def _names(images: Images, config: LatentsConfig) -> list[str]:
    return [
        shards.name_of(split, number)
        for split in shards.SPLITS
        for number in range(-(-images.rows(split) // config.rows_per_shard))
    ]


def pieces_left(config: LatentsConfig, inputs: Inputs, out: Path, report: Reporter) -> list[str]:
    """The names of the shards without a commit, for the tasks of an array; the VAE is kept where these find it."""
    vae.announce(vae_of(config), report.say)
    _, facts = _begin(config, inputs["data"], mirror.local_folder(out), out)
    names = _names(Images(inputs["data"], facts), config)
    done = _done(out, names)
    return [name for name in names if name not in done]


def make_pieces(
    config: Mapping[str, Any], inputs: Inputs, out: Path, mine: Sequence[str], left: Sequence[str], report: Reporter
) -> list[Outcome]:
    """Encodes the shards `left` of those that are a task's. Returns the failures."""
    section = LatentsConfig.model_validate(config)
    vae.announce(vae_of(section), report.say)
    images = Images(inputs["data"], vae.read_facts(out))
    rows = {name: len(images.rows_of(name, section.rows_per_shard)) for name in mine}
    done, total = sum(rows.values()) - sum(rows[name] for name in left), sum(rows.values())
    outcomes = slurm.run(_work(section, inputs["data"], out), jobs_of(left), 1, report)
    return settled(out, outcomes, report, done, total, "images")


def _begin(
    config: LatentsConfig, data: Path, out: Path, shared: Path
) -> tuple[dict[str, tuple[str, int]], VaeFacts]:  # fmt: skip
    """Keeps the VAE beside the latents in a folder of this machine, and writes what they are made with.

    Workers find both in `shared`. Gives the digests of the kept files.
    """
    source, sha256 = ImageDataset.open(data, "train"), vae.identity(vae_of(config))["vae"]
    fits(config, {"image_dtype": source.dtype, "image_shape": source.image_shape})
    channels, height, width = source.image_shape
    loaded, shape = tried(config, (channels, height, width), device_here(config))
    kept = vae.keep(vae_of(config), out, sha256)
    facts = VaeFacts(
        vae=vae.KIND if kept else vae_of(config), sha256=sha256, options=config.options, state=loaded.state,
        scale=loaded.scale, shift=loaded.shift, image_shape=(channels, height, width), latent_shape=shape,
        posterior=config.posterior, seed=config.seed, mirrors=config.mirrors, batch_size=config.batch_size,
        precision=config.precision,
    )  # fmt: skip
    atomic.write_json(out / vae.FACTS, facts.model_dump(mode="json"))
    shards.share_vae(shared, out, {**kept, vae.FACTS: atomic.hash_file(out / vae.FACTS)})
    return kept, facts


def _done(out: Path, names: Sequence[str]) -> dict[str, Commit]:
    """The commits that are there, by the name of their shard."""
    found = several(out, lambda name: _committed(out, name), names)
    return {commit.name: commit for commit in found if commit is not None}


def _committed(out: Path, name: str) -> Commit | None:
    """The commit of a shard whose file is there, in its place or not yet."""
    path = records.path_of(out, name)
    if not exists(path):
        return None
    commit = records.read(Commit, out, name)
    if any(size_of(out / file) == commit.bytes for file in (commit.file, place_of(name))):
        return commit
    remove(path)
    return None


def _reconstruction(encoder: LatentEncoder) -> float:
    """RMS in [-1, 1] of the first training images, decoded from their stored latents, minus themselves."""
    import torch

    rows = np.arange(min(COMPARED, encoder.facts.batch_size, len(encoder.images.splits["train"])))
    stored = torch.from_numpy(encoder.latents("train", rows).astype(shards.DTYPE))
    back = encoder.vae.decode(stored).cpu().numpy()
    return float(np.square(back - encoder.images.images("train", rows), dtype=np.float64).mean() ** 0.5)


def _finish(
    config: LatentsConfig, data: Path, out: Path, commits: Mapping[str, Commit], encoder: LatentEncoder,
    kept: dict[str, tuple[str, int]], error: float, report: Reporter,
) -> Result:  # fmt: skip
    facts, images = encoder.facts, encoder.images
    for name, commit in commits.items():
        atomic.place(out / commit.file, out / place_of(name), commit.bytes)
    source, about = images.splits["train"], atomic.read_json(data / "manifest.json").get("dataset")
    (out / DATASET).unlink(missing_ok=True)  # of a run that was killed before its manifest
    writer = DatasetWriter(
        out, f"{source.name} latents", facts.latent_shape, source.classes, config.rows_per_shard, shards.DTYPE,
        facts.scale, f"{facts.vae} {facts.sha256}", facts.shift or None,
    )  # fmt: skip
    for split in shards.SPLITS:
        rows = np.arange(images.rows(split))
        own = [StoredFile(place_of(name), commit.sha256, commit.bytes)
               for name, commit in commits.items() if name.startswith(f"{split}-")]  # fmt: skip
        writer.adopt_split(
            split, own, images.labels(split, rows), images.keys(split, rows), images.captions(split, rows)
        )
    payload = writer.close()
    payload[vae.FACTS] = atomic.hash_file(out / vae.FACTS)
    found = shards.moments(commits, math.prod(facts.latent_shape))
    if found["std"] and not 1 / UNUSUAL < found["std"] < UNUSUAL:
        report.say(
            f"the latents have a standard deviation of {found['std']:.3g}, where about 1 suits what trains on them: "
            f"set latents.scale = {facts.scale / found['std']:.4g}"
        )
    metrics = {
        "images": images.rows("train"),
        "heldout": images.rows("heldout"),
        "classes": len(source.classes),
        "image_shape": list(facts.latent_shape),
        "image_dtype": shards.DTYPE,
        "of": by(facts.image_shape),
        "scale": facts.scale,
        "shift": facts.shift,
        **{f"latent_{name}": round(value, 4) for name, value in found.items()},
        "reconstruction": round(error, 4),
    }
    return Result(
        payload=list(payload), files=[*writer.files, *kept], digests=payload | writer.files | kept, metrics=metrics,
        extra={} if about is None else {"dataset": about},
    )  # fmt: skip
