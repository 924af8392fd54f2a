"""Pairs: send every training image through the coupling, once a draw, into the store's shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from nfm.stages import costs
from nfm.stages.encoder import Setup
from nfm.stages.executors import Outcome, ShardJob, new_attempt
from nfm.stages.pairs_upkeep import check_files
from nfm.stages.stage import Finding, Inputs, Reporter, Result, Section, StageError, Stopped, added, operational
from nfm.stages.training import WEIGHTS, Precision, pick_device
from nfm.storage import ImageDataset, atomic, commits, generations
from nfm.storage.export import converted
from nfm.storage.schema import StoreSpec, pair_fields, read_spec, shard_name

NAME = "pairs"
VERSION = 1


class PairsConfig(Section):
    """The `[pairs]` table; every draw pairs each training image with new noise, flips drawn anew.

    `layout` and `codec` say how records lie on disk and how the noise is rounded, see docs/pairs-store.md; a finished
    store is converted by `nfm pairs export`, the archive codec `pcodec` is made in no other way.
    """

    coupling: Literal["nfm", "independent"] = "nfm"
    draws: int = operational(1, ge=1, le=1000)
    codec: Literal["float16", "float32", "int8"] = "float16"
    layout: Literal["blocks", "samples", "zarr"] = added("blocks")
    rows_per_shard: int = Field(4096, ge=1)
    rows_per_block: int = Field(256, ge=1)
    flips: bool = False
    seed: int = Field(0, ge=0)
    batch_size: int = Field(256, ge=1)
    precision: Precision = "float32"
    executor: Literal["ray", "serial"] = operational("ray")
    ray_address: str | None = operational(None)
    workers: int = operational(0, ge=0)
    threads: int = operational(1, ge=1)
    device: str = operational("auto")


def input_roles(config: PairsConfig) -> tuple[str, ...]:
    """What the coupling is made from."""
    return ("data", "teacher") if config.coupling == "nfm" else ("data",)


def manifest_name(config: PairsConfig, out: Path) -> str:
    """The manifest of the newest generation that holds exactly the draws asked for, else the next one's name."""
    for number in reversed(generations.numbers(out)):
        if generations.load(out, number)["draws"] == config.draws:
            return generations.manifest_path(out, number).name
    return generations.manifest_path(out, generations.next_number(out)).name


def describe(config: PairsConfig, inputs: Inputs) -> dict[str, Any]:
    """The store's recipe, for `spec.json`."""
    source = ImageDataset.open(inputs["data"], "train")
    if config.flips and source.dtype != "uint8":
        raise StageError(
            "pairs.flips = true: these images are latents, and a flipped latent is not the latent of the flipped "
            "image. Encode flipped images into the data set as rows of their own, and leave pairs.flips out"
        )
    facts: dict[str, Any] = {"eta": None, "sigma_f": None}
    if "teacher" in inputs:
        facts = atomic.read_json(inputs["teacher"] / "teacher.json")
    spec = StoreSpec(
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
    return {"store": spec.to_dict()}


def recipe(manifest: Mapping[str, Any], inputs: Inputs, found: StoreSpec) -> StoreSpec:
    """The recipe that a store should have by its inputs; of an export, in the layout and codec it was exported to."""
    spec = StoreSpec.from_dict(describe(PairsConfig(**manifest["config"]), inputs)["store"])
    return converted(spec, found.layout, found.codec) if "exported" in manifest else spec


def run(config: PairsConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Encode the shards that have no commit yet, then seal the generation."""
    spec = read_spec(out)
    done = commits.committed(out, config.draws)
    check_files(out, done)
    names = [(draw, shard) for draw in range(config.draws) for shard in range(spec.shards_per_draw)]
    pending = [ShardJob(draw, shard, new_attempt()) for draw, shard in names if shard_name(draw, shard) not in done]
    records = sum(commit.records for commit in done.values())
    total = spec.rows * config.draws
    if done:
        report.say(f"{len(done)} of {len(names)} shards are committed already")
    report.progress(records, total, "pairs")
    failures: list[Outcome] = []
    for outcome in _encode(config, setup(config, inputs, out), pending, report) if pending else ():
        if outcome.commit is None:
            failures.append(outcome)
            _set_aside(out, outcome, report)
        else:
            records += outcome.commit.records
            report.log("COMMIT", shard=outcome.commit.name, seconds=outcome.commit.seconds)
        report.progress(records, total, "pairs", failed=len(failures))
    if report.stopping:
        raise Stopped
    if failures:
        raise StageError(
            f"{len(failures)} of {len(names)} shards failed three times and are missing: "
            f"{', '.join(shard_name(f.job.draw, f.job.shard) for f in failures[:5])}; their tracebacks are in "
            f"{out / 'failed'}. The others are committed; run the same command again to retry only these"
        )
    return seal(out, config.draws)


def seal(out: Path, draws: int) -> Result:
    """The generation that holds these draws, from its commits; raises where commits or their files are missing."""
    spec = read_spec(out)
    check_files(out, commits.committed(out, draws))
    body = generations.build(out, spec, draws)
    moments = body["moments"]
    metrics = {
        "pairs": body["records"],
        "draws": draws,
        "noise_mean": moments["mean"],
        "noise_var": moments["var"],
        "bytes": sum(shard["bytes"] for shard in body["shards"]),
        "shards": len(body["shards"]),
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
    encoding = costs.describe(flops) if flops else {}
    return {"pairs": f"{pairs:,}", "draws": str(config.draws), "MB": f"{stored / 1e6:,.0f}", **encoding}


def audit(
    inputs: Inputs, store: Path, level: Literal["quick", "default", "deep"], sample: int
) -> tuple[list[Finding], list[str]]:
    """What is wrong with a store, see `pairs_audit.audit`."""
    from nfm.stages import pairs_audit

    return pairs_audit.audit(inputs, store, level, sample)


def setup(config: PairsConfig, inputs: Inputs, out: Path) -> Setup:
    """The encoder's setup; paths are absolute, since workers run elsewhere."""
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
        batch_size=config.batch_size,
        precision=config.precision,
        device=pick_device(config.device),
        threads=config.threads,
    )


def _encode(config: PairsConfig, encoder: Setup, pending: Sequence[ShardJob], report: Reporter) -> Any:
    from nfm.stages.executors import ray, serial

    def stopping() -> bool:
        return report.stopping

    if config.executor == "serial":
        return serial.run(encoder, pending, 1, stopping)
    return ray.run(encoder, pending, _workers(config, encoder.device), stopping, config.ray_address)


def _workers(config: PairsConfig, device: str) -> int:
    """One worker a GPU, else as many as the cores carry at `threads` each."""
    if config.workers:
        return config.workers
    if device.startswith("cuda"):
        import torch

        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // config.threads)


def _set_aside(out: Path, outcome: Outcome, report: Reporter) -> None:
    name = shard_name(outcome.job.draw, outcome.job.shard)
    atomic.write_bytes(out / "failed" / f"{name}.txt", (outcome.error or "").encode())
    last = (outcome.error or "").strip().splitlines()[-1:] or ["no message"]
    report.say(f"{name} failed three times and is set aside: {last[0]}")
    report.log("SHARD_FAILED", shard=name, error=outcome.error)


def _content(folder: Path) -> str:
    return atomic.read_json(folder / "manifest.json")["content_digest"]
