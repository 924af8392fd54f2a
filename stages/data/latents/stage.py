"""The latents stage: encodes every image of the data with a VAE, into a data set of latents of the same form.

What trains reads it as it reads data. Labels, keys and captions are those of the data, in its order; mirrored training
images are rows of their own behind all others. What needs pixels again finds the VAE here.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.base import Inputs, Reporter, Result, StageError, Stopped, Unfit, call
from nfm.stages.data.latents import shards
from nfm.stages.data.latents.config import LatentsConfig
from nfm.stages.data.latents.shards import ATTEMPTS, Commit, Images, LatentEncoder, LatentWork, commit_path, place_of
from nfm.stages.executors import EXECUTORS, ray_cluster
from nfm.stages.executors.jobs import Job, last_line, new_attempt
from nfm.stages.executors.tally import Tally
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.timing import Clock
from nfm.stages.trained.foreign import vae
from nfm.stages.trained.foreign.vae import Vae, VaeFacts
from nfm.stages.trained.training import check_precision
from nfm.storage import ImageDataset
from nfm.storage.dataset.images import DatasetWriter
from nfm.storage.errors import by
from nfm.storage.errors.masked import masked
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import artifacts_root, is_remote, size_of

NAME = "latents"
VERSION = 1
COMPARED = 16  # images that are decoded again, to tell how much the VAE loses
UNUSUAL = 2.0  # a standard deviation that is so many times off 1 is told


def external(config: LatentsConfig) -> dict[str, str]:
    """The digest of the VAE, which its path does not tell."""
    return vae.identity(_named(config))


def fits(config: LatentsConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where the VAE does not take such images, as far as `facts` tell of the data."""
    if (dtype := facts.get("image_dtype", "uint8")) != "uint8":
        raise Unfit(f"latents.vae = {config.vae!r}: the data's images are {dtype} already, no pixels; leave it out")
    if "image_shape" in facts:
        vae.latent_shape(_named(config), facts["image_shape"])


def told(config: LatentsConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the latents before they are made, given the facts of the data; nothing of a function runs."""
    found = {key: value for key, value in facts.items() if key in ("heldout", "classes")}
    if "images" in facts:
        found["images"] = facts["images"] * (2 if config.mirrors else 1)
    shape = vae.latent_shape(_named(config), facts["image_shape"]) if "image_shape" in facts else None
    return found | {"image_dtype": shards.DTYPE} | ({} if shape is None else {"image_shape": list(shape)})


def tries(config: LatentsConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit where the VAE cannot be loaded, or is not what it should be: a function's code runs here."""
    named = _named(config)
    if vae.is_function(named):
        if "image_shape" in facts:
            _tried(config, facts["image_shape"], "cpu")
    elif importlib.util.find_spec("diffusers") is None:
        from nfm.trainers.models.autoencoder import INSTALL

        raise Unfit(f"latents.vae = {named!r} is read with diffusers, which is not installed: {INSTALL}")


def needs(config: LatentsConfig) -> None:
    """Raises StageError if something that a run needs is missing: the Ray cluster or the device."""
    executor = EXECUTORS[config.executor]
    if executor.later:
        raise Unfit(f'latents.executor = "{config.executor}" is of pairs; use "ray", or "serial"')
    if executor.cluster and is_remote(root := artifacts_root()):
        raise Unfit(f'latents.executor = "{config.executor}": artifacts are in {root}; use "serial"')
    if executor.cluster:
        who, without = f'latents.executor = "{config.executor}"', "--set latents.executor=serial"
        ray_cluster.check_reachable(config.ray_address, who, without)
    if not executor.cluster or ray_cluster.address_of(config.ray_address) == "local":
        check_precision(pick_device(config.device), config.precision, "latents.precision")


def room(config: LatentsConfig, facts: Mapping[str, Any]) -> int:
    """The bytes on disk; 0 where the shape of a latent is not known yet."""
    known = told(config, facts)
    if not {"images", "image_shape"} <= known.keys():
        return 0
    return (known["images"] + known.get("heldout", 0)) * math.prod(known["image_shape"]) * 2


def cost(config: LatentsConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """Images to encode, and bytes on disk. A VAE is not timed."""
    images = told(config, facts)["images"] + facts.get("heldout", 0)
    return Cost(images, "images", bytes=room(config, facts) or None, unknown="no time (a VAE is not timed)")


def run(config: LatentsConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Encodes the shards that have no commit yet, then places them and writes what describes them."""
    named = _named(config)
    vae.announce(named, report.say)
    kept, facts = _begin(config, inputs["data"], out)
    images = Images(inputs["data"], facts)
    names = [
        shards.name_of(split, number)
        for split in shards.SPLITS
        for number in range(-(-images.rows(split) // config.rows_per_shard))
    ]
    done = {name: commit for name in names if (commit := _committed(out, name)) is not None}
    total = sum(images.rows(split) for split in shards.SPLITS)
    finished = sum(commit.records for commit in done.values())
    if done and len(done) < len(names):
        report.say(f"{len(done)} of {len(names)} shards are committed already")
    report.progress(finished, total, "images")
    if lacking := [name for name in names if name not in done]:
        done |= _encode(config, inputs["data"], out, lacking, finished, total, report)
    encoder = LatentEncoder(out, inputs["data"], _here(config))
    error = _reconstruction(encoder)
    return _finish(config, inputs["data"], out, {name: done[name] for name in names}, encoder, kept, error, report)


def _encode(
    config: LatentsConfig, data: Path, out: Path, names: list[str], finished: int, total: int, report: Reporter
) -> dict[str, Commit]:
    """The commits of these shards, encoded where the config says. Raises Stopped, or StageError if some failed."""
    executor = EXECUTORS[config.executor]
    work = LatentWork(
        store=str(out.resolve()), data=mirror.origin(data), rows_per_shard=config.rows_per_shard,
        beside=str(Path.cwd()), device=config.device, threads=config.threads,
    )  # fmt: skip
    more = {"address": config.ray_address, "say": report.say} if executor.cluster else {}
    jobs = (Job(name, new_attempt()) for name in names)
    done: dict[str, Commit] = {}
    failed: dict[str, str] = {}
    tally = Tally()
    for outcome in call(executor.run, work, jobs, config.workers, report, **more):
        if outcome is not None and outcome.commit is None:
            failed[outcome.job.name] = str(outcome.error)
            report.log("SHARD_FAILED", shard=outcome.job.name, error=masked(str(outcome.error)), worker=outcome.worker)
        elif outcome is not None:
            done[outcome.job.name] = outcome.commit
            finished += outcome.commit.records
            tally.add(outcome)
            report.log("COMMIT", shard=outcome.job.name, seconds=outcome.commit.seconds, worker=outcome.worker)
        report.progress(finished, total, "images", tally.rows(), failed=len(failed))
    if failed:
        name, error = next(iter(failed.items()))
        raise StageError(
            f"{len(failed)} of {len(names)} shards failed, the first one {name}: {last_line(masked(error))}; all "
            f"tracebacks are in the log, {out / 'events'}. The other shards are committed: mend the cause and "
            f"{executor.again}"
        )
    if len(done) < len(names):
        raise Stopped
    return done


def _here(config: LatentsConfig) -> str:
    """The device of this process, which with a cluster need not be one of its workers."""
    return pick_device("auto" if EXECUTORS[config.executor].cluster else config.device)


def _named(config: LatentsConfig) -> str:
    if config.vae is None:
        raise Unfit("latents.vae: missing; name the folder of an AutoencoderKL, or a function as `module:function`")
    return config.vae


def _tried(config: LatentsConfig, image_shape: tuple[int, int, int], device: str) -> tuple[Vae, tuple[int, int, int]]:
    """The VAE and the shape of its latents, found with two made-up images. Raises Unfit where it is not what it
    should be.
    """
    import torch

    loaded = vae.load(_named(config), image_shape, config.options, device, config.precision)
    scale, shift = (own if given is None else given for given, own in (
        (config.scale, loaded.scale), (config.shift, loaded.shift)))  # fmt: skip
    loaded = replace(loaded, scale=scale, shift=shift)
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise Unfit(
            f"latents.vae = {config.vae!r}: its scale is {scale}, its shift {shift}; set latents.scale and shift"
        )
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return loaded, vae.check(loaded, images, str(config.vae))


def _begin(config: LatentsConfig, data: Path, out: Path) -> tuple[dict[str, tuple[str, int]], VaeFacts]:
    """Keeps the VAE beside the latents, and writes what they are made with. Gives the digests of the kept files."""
    source, sha256 = ImageDataset.open(data, "train"), vae.identity(_named(config))["vae"]
    fits(config, {"image_dtype": source.dtype, "image_shape": source.image_shape})
    channels, height, width = source.image_shape
    loaded, shape = _tried(config, (channels, height, width), _here(config))
    kept = vae.keep(_named(config), out, sha256)
    facts = VaeFacts(
        vae=vae.KIND if kept else _named(config), sha256=sha256, options=config.options, state=loaded.state,
        scale=loaded.scale, shift=loaded.shift, image_shape=(channels, height, width), latent_shape=shape,
        posterior=config.posterior, seed=config.seed, mirrors=config.mirrors, batch_size=config.batch_size,
        precision=config.precision,
    )  # fmt: skip
    atomic.write_json(out / vae.FACTS, facts.model_dump(mode="json"))
    return kept, facts


def _committed(out: Path, name: str) -> Commit | None:
    """The commit of a shard whose file is there, in its place or not yet."""
    if not commit_path(out, name).exists():
        return None
    commit = shards.read_commit(out, name)
    if commit.bytes in (size_of(out / commit.written), size_of(out / place_of(name))):
        return commit
    commit_path(out, name).unlink()
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
        atomic.place(out / commit.written, out / place_of(name), commit.bytes)
    source, about = images.splits["train"], atomic.read_json(data / "manifest.json").get("dataset")
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
    shutil.rmtree(out / ATTEMPTS, ignore_errors=True)
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
