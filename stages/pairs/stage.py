"""The pairs stage: sends every training image through the coupling, once in each draw, into the shards of the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfm.stages import executors
from nfm.stages.base import (
    Inputs,
    Reporter,
    Result,
    StageError,
    Stopped,
)
from nfm.stages.couplings import custom
from nfm.stages.couplings.facts import FACTS, facts_of
from nfm.stages.display.units import number_of
from nfm.stages.encoding.setup import Setup
from nfm.stages.executors import EXECUTORS, ray_cluster
from nfm.stages.executors.jobs import jobs_of
from nfm.stages.executors.outcomes import all_failed, reasons
from nfm.stages.executors.ray_cluster import address_of
from nfm.stages.pairs import production as making
from nfm.stages.pairs import sealing
from nfm.stages.pairs.config import PLAIN_BATCH, PairsConfig
from nfm.stages.pairs.recipe import (
    maker,
    options,
    planned_spec,
    small_groups,
    store_spec,
)
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import check_precision
from nfm.stages.trained.devices.timing import Clock
from nfm.stages.trained.foreign import own
from nfm.stages.trained.weights import WEIGHTS
from nfm.storage.errors import NewerSchema, StorageError
from nfm.storage.export import converted
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.format.spec import StoreSpec, read_spec
from nfm.storage.ledger import seal as generations

NAME = "pairs"
VERSION = 1
NOT_OURS = "the pairs stage did not seal it"
NOT_OURS_REMEDY = "move the store away and run the stage again; pairs of your own belong in another folder"


def input_roles(config: PairsConfig) -> tuple[str, ...]:
    """The inputs that the coupling is made from."""
    maker = facts_of(config.coupling).made_with
    return ("data", maker) if maker else ("data",)


def for_coupling(config: PairsConfig, coupling: str) -> PairsConfig:
    """The section for this coupling. Options of other couplings get their defaults, so that they change nothing."""
    others = (name for owner, facts in FACTS.items() if owner != coupling for name in facts.options)
    defaults = {name: PairsConfig.model_fields[name].default for name in others}
    return PairsConfig.model_validate({**config.model_dump(), **defaults, "coupling": coupling})


def fits(config: PairsConfig, facts: Mapping[str, Any]) -> None:
    """Raises Unfit if options do not fit each other or the data, as far as `facts` describe it."""
    options(config)
    if {"images", "image_shape"} <= facts.keys():
        planned_spec(config, facts, config.codec)


def needs(config: PairsConfig) -> None:
    """Raises StageError if something that a run needs is missing: the Ray cluster or the device."""
    executor = EXECUTORS[config.executor]
    if executor.cluster:
        ray_cluster.check_reachable(config.ray_address)
    if not ray_cluster.elsewhere(executor, config.ray_address):
        check_precision(pick_device(config.device), config.precision, "pairs.precision")


def room(config: PairsConfig, facts: Mapping[str, Any]) -> int:
    """The bytes of the store on disk; 0 if nothing is known about the data yet."""
    from nfm.stages.pairs.estimate import bytes_of_draw

    if not {"images", "image_shape"} <= facts.keys():
        return 0
    return bytes_of_draw(planned_spec(config, facts, config.codec)) * config.draws


def external(config: PairsConfig) -> dict[str, str]:
    """Digests of what decides the pairs but is not in an artifact: the file of a custom coupling."""
    return {"custom": custom.digest(custom.source_file(config.custom))} if facts_of(config.coupling).code else {}


def manifest_name(config: PairsConfig, out: Path) -> str:
    """The manifest of the newest generation that fits the config, else the name of the next one."""
    for number in reversed(generations.numbers(out)):
        try:
            sealed = generations.load(out, number)
        except NewerSchema:
            raise
        except StorageError:  # damage is told by whoever opens it
            return generations.manifest_path(out, number).name
        lacking = sum(len(hole.slots) for hole in sealed.excluded)
        if sealed.draws == config.draws and lacking <= config.max_missing:
            path = generations.manifest_path(out, number)
            if "fingerprint" not in sealed.body:
                raise StorageError(f"{path}: {NOT_OURS}; {NOT_OURS_REMEDY}")
            return path.name
    return generations.manifest_path(out, generations.next_number(out)).name


def describe(config: PairsConfig, inputs: Inputs) -> dict[str, Any]:
    """For `spec.json`: the recipe of the store, and the batch shape with the test that chose it."""
    spec = store_spec(config, inputs)
    if config.batch_size != "auto":
        return {"store": spec.to_dict(), "encoding": {"batch_size": config.batch_size}}
    if "teacher" not in inputs:
        # A coupling that chooses images reads a whole class for each batch. Larger batches mean fewer reads.
        size = spec.rows_per_shard if facts_of(spec.coupling).image == "chosen" else PLAIN_BATCH
        return {"store": spec.to_dict(), "encoding": {"batch_size": size}}
    from nfm.stages.encoding import probe

    facts = (mirror.origin(inputs["teacher"]), spec.image_shape, spec.classes or 0, spec.eta)
    how: dict[str, Any] = {"precision": config.precision, "threads": config.threads}
    sizes = [size for size in probe.SIZES if size <= spec.rows_per_shard]
    address = address_of(config.ray_address)
    # on the workers' machine, which may have other devices
    if EXECUTORS[config.executor].cluster and address != "local":
        from nfm.stages.executors import ray

        found = ray.on_a_worker(probe.for_teacher, config.device, config.threads, address, *facts, sizes=sizes, **how)
    else:
        found = probe.for_teacher(*facts, device=pick_device(config.device), sizes=sizes, **how)
    return {"store": spec.to_dict(), "encoding": {"batch_size": found.batch_size, "probe": found.rates}}


def recipe(
    manifest: Mapping[str, Any], inputs: Inputs, found: StoreSpec, recorded: Mapping[str, str] = {}
) -> StoreSpec:
    """The recipe that a store should have, given its inputs. An export has the layout and codec of its export.

    The file of a custom coupling is not an input. Its digest is taken from `recorded` (the `external` part of the
    fingerprint), which is right when pairs are made again, or else from the store. Raises StageError if neither has
    one: the module that is here now may not be the one that made the pairs.
    """
    sha256 = recorded.get("custom", (found.coupling_options or {}).get("sha256"))
    config = PairsConfig(**manifest["config"])
    if facts_of(config.coupling).code and not sha256:
        raise StageError(
            f"its custom function {config.custom!r} has no digest recorded, so nobody can say which code made its "
            "pairs; make the store again from code that you know"
        )
    spec = store_spec(config, inputs, sha256)
    return converted(spec, found.layout, found.codec) if "exported" in manifest else spec


def run(config: PairsConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Encodes the shards that have no commit yet, then seals the generation."""
    spec = read_spec(out)
    total, shards = spec.rows * config.draws, spec.shards_per_draw * config.draws
    lacking = making.pending(out, spec, config.draws)
    if lacking and (told := small_groups(spec, inputs)):
        report.say(told)
    if len(lacking) < shards:
        report.say(f"{shards - len(lacking)} of {shards} shards are committed already")
    if lacking and not EXECUTORS[config.executor].later:
        setting = setup(config, inputs, out)
        announce(spec, setting, report)
        done = total - making.records_of(spec, lacking)
        outcomes = executors.run(config, setting, jobs_of(lacking), report)
        failed = making.produce(out, outcomes, setting.batch_size, report, done, total)
        lacking = making.pending(out, spec, config.draws)
        if report.stopping or (report.ending and len(lacking) > len(failed)):
            raise Stopped
    pairs = making.records_of(spec, lacking)
    if pairs > config.max_missing or not all_failed(out, lacking):
        raise making.missing(out, lacking, shards, pairs, config.max_missing, EXECUTORS[config.executor].again(NAME))
    return seal(out, config.draws, reasons(out, lacking), inputs if config.report else None, report, config.device)


def announce(spec: StoreSpec, setting: Setup, report: Reporter | custom.Allowed) -> None:
    """Says whose code is about to run, if encoding runs a user's function."""
    if facts_of(spec.coupling).code:
        told = spec.coupling_options or {}
        report.say(custom.announced(setting.maker, str(told.get("function")), str(told.get("sha256"))))
    for stage, folder in (("teacher", setting.teacher), ("student", setting.maker if spec.student else None)):
        if folder is not None:
            own.announce_made(Path(mirror.here(folder)), stage, report.say)


def seal(
    out: Path,
    draws: int,
    excluded: Mapping[str, str] = {},
    inputs: Inputs | None = None,
    report: Reporter | None = None,
    device: str = "auto",
) -> Result:
    """Seals the generation of these draws from its commits. Raises if commits or their files are missing.

    `excluded` names shards that may be missing, with the reasons for the manifest. With `inputs`, the manifest gets a
    coupling report of these pairs, made on `device`; if that is not possible, a message says why.
    """
    body = generations.build(out, read_spec(out), draws, excluded)
    if inputs is not None:
        body = body | sealing.of_sealing(out, body, inputs, report, device)
    if report is not None and (whole := body.get(generations.PART_OF)) is not None:
        report.say(f"sealed for this config; whoever opens the folder still gets generation {whole}, with more draws")
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


def cost(config: PairsConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """Pairs, bytes on disk, and the arithmetic of finding them; the time of one worker where that can be told."""
    from nfm.stages.pairs import estimate

    plan = estimate.estimate(config, facts, [], clock=clock)
    one = plan.get("worker")
    return Cost(
        plan["pairs"],
        "pairs",
        told=number_of(config.draws, "draw"),
        bytes=plan["bytes"][config.codec],
        flops=plan.get("flops"),
        seconds=plan["pairs"] / one["images_per_second"] if one else None,
        where="by one worker here",
        unknown=f"no time ({plan['no_time']})" if "no_time" in plan else "",
    )


def setup(config: PairsConfig, inputs: Inputs, out: Path) -> Setup:
    """The setup of the encoder. Paths are absolute, because workers run elsewhere; they also choose the device."""
    teacher = inputs.get("teacher")
    weights = None
    if teacher is not None:
        listed = {file["path"]: file["sha256"] for file in atomic.read_json(teacher / "manifest.json")["files"]}
        weights = listed[WEIGHTS]
    return Setup(
        store=mirror.origin(out),
        data=mirror.origin(inputs["data"]),
        teacher=mirror.origin(teacher) if teacher is not None else None,
        teacher_sha256=weights,
        batch_size=_batch_size(config, out),
        precision=config.precision,
        device=config.device,
        threads=config.threads,
        compile=config.compile,
        maker=maker(config, inputs),
        beside=str(Path.cwd()),
    )


def _batch_size(config: PairsConfig, out: Path) -> int:
    """The batch shape in the store's spec. Older stores and exports have none; then the config's."""
    stated = atomic.read_json(out / "spec.json").get("encoding", {}).get("batch_size", config.batch_size)
    return PLAIN_BATCH if stated == "auto" else int(stated)
