"""Pairs: send every training image through the coupling, once a draw, into the store's shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nfm.stages import costs
from nfm.stages import pairs_making as making
from nfm.stages.encoder import Setup
from nfm.stages.executors import Outcome, ShardJob
from nfm.stages.stage import Finding, Inputs, Reporter, Result, Section, StageError, Stopped, added, operational
from nfm.stages.training import WEIGHTS, Precision, pick_device
from nfm.storage import ImageDataset, atomic, generations, manifests
from nfm.storage.export import converted
from nfm.storage.schema import StoreSpec, pair_fields, read_spec

NAME = "pairs"
VERSION = 1
PLAIN_BATCH = 256  # where there is no teacher to run


class PairsConfig(Section):
    """The `[pairs]` table; every draw pairs each training image with new noise, flips drawn anew.

    `layout` and `codec` say how records lie on disk and how the noise is rounded, see docs/pairs-store.md; a finished
    store is converted by `nfm pairs export`, the archive codec `pcodec` is made in no other way. `batch_size` "auto"
    takes what a short probe proposes when the store begins; it stands in spec.json from then on, since last bits of the
    noise depend on it. A generation may lack up to `max_missing` pairs, of shards that fail; its manifest lists them.
    """

    coupling: Literal["nfm", "independent"] = "nfm"
    draws: int = operational(1, ge=1, le=1000)
    codec: Literal["float16", "float32", "int8"] = "float16"
    layout: Literal["blocks", "samples", "zarr"] = added("blocks")
    rows_per_shard: int = Field(4096, ge=1)
    rows_per_block: int = Field(256, ge=1)
    flips: bool = False
    seed: int = Field(0, ge=0)
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = 256
    precision: Precision = "float32"
    compile: bool = added(False)
    max_missing: int = operational(0, ge=0)
    executor: Literal["ray", "serial", "slurm"] = operational("ray")
    ray_address: str | None = operational(None)
    workers: int = operational(0, ge=0)
    threads: int = operational(1, ge=1)
    device: str = operational("auto")


def input_roles(config: PairsConfig) -> tuple[str, ...]:
    """What the coupling is made from."""
    return ("data", "teacher") if config.coupling == "nfm" else ("data",)


def manifest_name(config: PairsConfig, out: Path) -> str:
    """The manifest of the newest generation that is what the config asks for, else the next one's name."""
    for number in reversed(generations.numbers(out)):
        manifest = manifests.raw(out, number)
        lacking = sum(shard["records"] for shard in manifest.get("excluded", ()))
        if manifest["draws"] == config.draws and lacking <= config.max_missing:
            return generations.manifest_path(out, number).name
    return generations.manifest_path(out, generations.next_number(out)).name


def describe(config: PairsConfig, inputs: Inputs) -> dict[str, Any]:
    """For `spec.json`: the store's recipe, and the batch shape with the probe that proposed it."""
    spec = store_spec(config, inputs)
    if config.batch_size != "auto":
        return {"store": spec.to_dict(), "encoding": {"batch_size": config.batch_size}}
    if "teacher" not in inputs:
        return {"store": spec.to_dict(), "encoding": {"batch_size": PLAIN_BATCH}}
    from nfm.stages import probe

    facts = (str(inputs["teacher"].resolve()), spec.image_shape, spec.classes or 0, spec.eta)
    how: dict[str, Any] = {"precision": config.precision, "threads": config.threads, "compile": config.compile}
    sizes = [size for size in probe.SIZES if size <= spec.rows_per_shard]
    address = config.ray_address or os.environ.get("RAY_ADDRESS", "local")
    if config.executor == "ray" and address != "local":  # where the workers are, which may have other devices
        from nfm.stages.executors import ray

        found = ray.on_a_worker(probe.for_teacher, config.device, config.threads, address, *facts, sizes=sizes, **how)
    else:
        found = probe.for_teacher(*facts, device=pick_device(config.device), sizes=sizes, **how)
    return {"store": spec.to_dict(), "encoding": {"batch_size": found.batch_size, "probe": found.rates}}


def store_spec(config: PairsConfig, inputs: Inputs) -> StoreSpec:
    """The recipe that the config and its inputs give."""
    source = ImageDataset.open(inputs["data"], "train")
    if config.flips and source.dtype != "uint8":
        raise StageError(
            "pairs.flips = true: these images are latents, and a flipped latent is not the latent of the flipped "
            "image. Encode flipped images into the data set as rows of their own, and leave pairs.flips out"
        )
    facts: dict[str, Any] = {"eta": None, "sigma_f": None}
    if "teacher" in inputs:
        facts = atomic.read_json(inputs["teacher"] / "teacher.json")
    return StoreSpec(
        rows=len(source),
        rows_per_shard=config.rows_per_shard,
        rows_per_block=config.rows_per_block,
        fields=pair_fields(source.image_shape, config.codec, source.dtype, label=bool(source.classes)),
        coupling=config.coupling,
        source=_content(inputs["data"]),
        codec=config.codec,
        layout=config.layout,
        value_range=source.value_range,
        image_scale=source.image_scale,
        image_decoder=source.image_decoder,
        flips=config.flips,
        seed=config.seed,
        eta=facts["eta"],
        sigma_f=facts["sigma_f"],
        teacher=_content(inputs["teacher"]) if "teacher" in inputs else None,
        classes=len(source.classes) or None,
    )


def recipe(manifest: Mapping[str, Any], inputs: Inputs, found: StoreSpec) -> StoreSpec:
    """The recipe that a store should have by its inputs; of an export, in the layout and codec it was exported to."""
    spec = store_spec(PairsConfig(**manifest["config"]), inputs)
    return converted(spec, found.layout, found.codec) if "exported" in manifest else spec


def run(config: PairsConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Encode the shards that have no commit yet, then seal the generation."""
    spec = read_spec(out)
    total, shards = spec.rows * config.draws, spec.shards_per_draw * config.draws
    lacking = making.pending(out, spec, config.draws)
    if len(lacking) < shards:
        report.say(f"{shards - len(lacking)} of {shards} shards are committed already")
    if lacking and config.executor != "slurm":
        setting = setup(config, inputs, out)
        done = total - making.records_of(spec, lacking)
        outcomes = _encode(config, setting, making.jobs(lacking), report)
        failed = making.produce(out, outcomes, setting.batch_size, report, done, total)
        lacking = making.pending(out, spec, config.draws)
        if report.stopping or (report.ending and len(lacking) > len(failed)):
            raise Stopped
    pairs = making.records_of(spec, lacking)
    if pairs > config.max_missing or not making.all_failed(out, lacking):
        again = "run `nfm submit pairs --slurm` again" if config.executor == "slurm" else "run the same command again"
        raise making.missing(out, lacking, shards, pairs, config.max_missing, again)
    return seal(out, config.draws, making.reasons(out, lacking))


def seal(out: Path, draws: int, excluded: Mapping[str, str] = {}) -> Result:
    """The generation that holds these draws, from its commits; raises where commits or their files are missing.

    `excluded` names shards that may be missing, with the reasons that the manifest is to give.
    """
    body = generations.build(out, read_spec(out), draws, excluded)
    moments = body["moments"]
    metrics = {
        "pairs": body["records"],
        "draws": draws,
        "noise_mean": moments["mean"],
        "noise_var": moments["var"],
        "bytes": body["bytes"],
        "shards": body["shard_count"],
    }
    return Result(
        payload=[],
        metrics=metrics,
        extra=body,
        content_digest=body["content_digest"],
        manifest=generations.manifest_path(out, body["generation"]).name,
    )


def cost(config: PairsConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    """Pairs, bytes on disk and the arithmetic of sending them through the teacher."""
    pairs = facts["images"] * config.draws
    fields = pair_fields(facts["image_shape"], config.codec, facts.get("image_dtype", "uint8"))
    stored = pairs * sum(field.bytes_per_record for field in fields)
    flops = pairs * costs.teacher_flops(facts["image_shape"], facts["teacher"]) if config.coupling == "nfm" else 0.0
    arithmetic = {"FLOPs": f"{flops:.2g}"} if flops else {}  # the time that it takes is measured by `pairs_plan`
    return {"pairs": f"{pairs:,}", "draws": str(config.draws), "MB": f"{stored / 1e6:,.0f}", **arithmetic}


def audit(
    inputs: Inputs, store: Path, level: Literal["quick", "default", "deep"], sample: int
) -> tuple[list[Finding], list[str]]:
    """What is wrong with a store, see `pairs_audit.audit`."""
    from nfm.stages import pairs_audit

    return pairs_audit.audit(inputs, store, level, sample)


def setup(config: PairsConfig, inputs: Inputs, out: Path) -> Setup:
    """The encoder's setup; paths are absolute, since workers run elsewhere, and so is the device theirs to choose."""
    teacher = inputs.get("teacher")
    weights = None
    if teacher is not None:
        listed = {file["path"]: file["sha256"] for file in atomic.read_json(teacher / "manifest.json")["files"]}
        weights = listed[WEIGHTS]
    return Setup(
        store=str(out.resolve()),
        data=str(inputs["data"].resolve()),
        teacher=str(teacher.resolve()) if teacher is not None else None,
        teacher_sha256=weights,
        batch_size=_batch_size(config, out),
        precision=config.precision,
        device=config.device,
        threads=config.threads,
        compile=config.compile,
    )


def _batch_size(config: PairsConfig, out: Path) -> int:
    """The store's batch shape, which its spec fixed; of a store from before that, or an export, the config's."""
    stated = atomic.read_json(out / "spec.json").get("encoding", {}).get("batch_size", config.batch_size)
    return PLAIN_BATCH if stated == "auto" else int(stated)


def _encode(
    config: PairsConfig, encoder: Setup, jobs: Iterable[ShardJob], report: Reporter
) -> Iterator[Outcome | None]:
    from nfm.stages.executors import ray, serial

    if config.executor == "serial":
        return serial.run(encoder, jobs, 1, report)
    return ray.run(encoder, jobs, config.workers, report, config.ray_address, report.say)


def _content(folder: Path) -> str:
    return atomic.read_json(folder / "manifest.json")["content_digest"]
