"""The cost of a store of pairs before it is made: shards, bytes by codec, FLOPs, hours by number of workers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nfm.stages.base import Unfit, call
from nfm.stages.couplings.facts import facts_of
from nfm.stages.display import units
from nfm.stages.display.tables import aligned
from nfm.stages.pairs.config import PLAIN_BATCH, PairsConfig
from nfm.stages.pairs.recipe import pair_flops, planned_spec
from nfm.stages.trained import costs
from nfm.stages.trained.devices import timing
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import check_precision
from nfm.stages.trained.devices.timing import Clock
from nfm.stages.trained.foreign import own
from nfm.storage import StoreSpec, layouts
from nfm.storage.format.codecs import CODECS

INDEX_BYTES = (2500, 13.5)  # of a shard's index part: fixed, and for each record; measured at 64 to 65,536 records
COMMIT_BYTES = 1200
_NO_FLOPS = "not counted: it runs no teacher, or one that is code of its user's own"
LARGE_LAYER = 2e9  # FLOPs of an image in one layer: of more, one layer is timed, not a block of them


class Worker(NamedTuple):
    """What one worker makes: pairs a second, by how it is known, with the batch that it was timed in."""

    per_second: float
    how: str
    batch_size: int | None = None


def worker(config: PairsConfig, facts: Mapping[str, Any], clock: Clock) -> Worker:
    """One worker here, timed. Raises Unfit where that cannot be done: for the coupling, or without its device."""
    known = facts_of(config.coupling)
    if known.timed is None:
        raise Unfit(f"pairs of {config.coupling} are not timed: {known.untimed or 'its coupling is not known here'}")
    owner = facts.get(known.made_with) if known.made_with in ("teacher", "student") else None
    if owner is not None and owner.model is not None:
        raise Unfit(f"pairs of {config.coupling}: {own.UNKNOWN_COST}")
    device = pick_device(config.device)
    check_precision(device, config.precision, "pairs.precision")
    cores = f"{config.threads} of {os.cpu_count()} CPU cores"
    if device.startswith("cuda"):
        import torch

        cores = torch.cuda.get_device_name(device)
    sizes = {"flops": pair_flops(config, facts), "shape": facts["image_shape"], "threads": config.threads}
    where = f"measured here, {cores}, {config.precision}"
    what = "the encoding of images" if known.made_with == "teacher" else f"the pairs of {config.coupling}"
    rate, batch_size = clock.measured(
        what, config.precision, {**sizes, "batch_size": config.batch_size, "device": device},
        lambda: call(known.timed or "", config, facts, device),
    )  # fmt: skip
    return Worker(rate, f"{where}, batch {batch_size}", batch_size)


def estimate(
    config: PairsConfig,
    facts: Mapping[str, Any],
    workers: Sequence[int],
    rate: float | None = None,
    committed: int = 0,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """The plan of a generation with `committed` pairs done, in JSON's types. Pairs are not counted one by one.

    `facts` are the data's: images, image_shape, and classes and image_dtype where they are told; and the sections by
    name. `rate` is pairs a second of one worker; None: one is timed here, where there is a clock and
    the coupling can be.
    Raises Unfit for sizes that do not fit each other.
    """
    able = [codec for codec in CODECS if facts_of(config.coupling).gaussian or not CODECS[codec].made]
    specs = {codec: planned_spec(config, facts, codec) for codec in {*able, config.codec}}
    spec = specs[config.codec]
    pairs = spec.rows * config.draws
    left, flops = pairs - committed, pair_flops(config, facts)
    plan: dict[str, Any] = {
        "pairs": pairs,
        "committed": committed,
        "images": spec.rows,
        "draws": config.draws,
        "shards": spec.shards_per_draw * config.draws,
        "rows_per_shard": config.rows_per_shard,
        "layout": config.layout,
        "codec": config.codec,
        "bytes": {codec: bytes_of_draw(specs[codec]) * config.draws for codec in CODECS if codec in specs},
        **({"flops": left * flops, "flops_per_image": flops} if flops else {}),
    }
    try:
        one = Worker(rate, "as given by --rate") if rate else worker(config, facts, clock) if clock else None
    except Unfit as error:
        return plan | {"no_time": str(error)}
    if one is None:
        return plan
    seconds = left / one.per_second
    return plan | {
        "worker": {
            "images_per_second": one.per_second,
            "how": one.how,
            **({"flops_per_second": flops * one.per_second} if flops else {}),
            **({"batch_size": one.batch_size, "precision": config.precision} if one.batch_size else {}),
        },
        # Of more workers than shards, the others have nothing to do.
        "hours": {str(count): float(f"{seconds / min(count, max(1, plan['shards'])) / 3600:.3g}") for count in workers},
    }


def as_text(plan: Mapping[str, Any]) -> str:
    """The plan as text."""
    sizes = (f"{codec} {units.size(count)}" for codec, count in plan["bytes"].items())
    there = f"; {plan['committed']:,} are committed, time is for the rest" if plan["committed"] else ""
    lines = [
        ["pairs", f"{plan['pairs']:,}: {plan['images']:,} images, draws {plan['draws']}{there}"],
        ["shards", f"{plan['shards']:,} of {plan['rows_per_shard']:,} pairs, layout {plan['layout']}"],
        ["on disk", f"{', '.join(sizes)}; the config's codec is {plan['codec']}"],
    ]
    if "flops" in plan:
        lines.append(["FLOPs", f"{plan['flops']:.2g}, {plan['flops_per_image']:.2g} an image"])
    if "worker" not in plan:
        untold = [["time", f"not known: {plan['no_time']}; --rate says it"]] if "no_time" in plan else []
        return aligned(["of the pairs", ""], [*lines, *untold])
    one = plan["worker"]
    speed = f", {units.figure(one['flops_per_second'] / 1e12, 3)} TFLOP/s" if "flops_per_second" in one else ""
    lines.append(["a worker", f"{units.rate(one['images_per_second'], 'images')}{speed}: {one['how']}"])
    hours = [[f"{int(count):,}", units.about(3600 * taken)] for count, taken in plan["hours"].items()]
    return "\n\n".join([aligned(["of the pairs", ""], lines), aligned(["workers", "time"], hours)])


def bytes_of_draw(spec: StoreSpec) -> int:
    """The bytes on disk of one draw: payload, index and commits."""
    whole, rest = divmod(spec.rows, spec.rows_per_shard)
    layout = layouts.of(spec)
    payload = whole * layout.shard_bytes(spec, spec.rows_per_shard) + (layout.shard_bytes(spec, rest) if rest else 0)
    a_shard, a_record = INDEX_BYTES
    return round(payload + spec.shards_per_draw * (a_shard + COMMIT_BYTES) + spec.rows * a_record)


def nfm_worker(config: PairsConfig, facts: Mapping[str, Any], device: str) -> tuple[float, int]:
    """Images a second of a teacher of random weights, and the batch. One of its blocks, which are alike, is timed; of
    large layers, one layer."""
    from nfm.stages.encoding import probe
    from nfm.trainers.models.tarflow import TarFlow

    teacher, shape, classes = facts["teacher"], facts["image_shape"], facts.get("classes", 0)
    part = teacher.model_copy(update={"blocks": 1})
    if costs.teacher_flops(shape, part) / teacher.layers > LARGE_LAYER:
        part = part.model_copy(update={"layers": 1})
    model = TarFlow(shape, classes, part.patch, part.channels, 1, part.layers, part.head_size)
    sizes = [size for size in probe.SIZES if config.batch_size == "auto" or size <= config.batch_size]
    found = probe.for_teacher(
        model.eval().to(device), shape, classes, teacher.eta, device, config.precision, config.threads,
        seconds=timing.SECONDS / 2, sizes=sizes,
    )  # fmt: skip
    return found.rate * costs.teacher_flops(shape, part) / costs.teacher_flops(shape, teacher), found.batch_size


def reflow_worker(config: PairsConfig, facts: Mapping[str, Any], device: str) -> tuple[float, int]:
    """Images a second that a student of random weights generates, and the batch; one evaluation of it is timed."""
    from nfm.stages.trained.devices.machine import threads
    from nfm.stages.trained.sampling import evaluations_per_second

    size = PLAIN_BATCH if config.batch_size == "auto" else config.batch_size
    with threads(config.threads):
        rate = evaluations_per_second(facts["student"], facts, device, config.precision, size, config.reflow_guidance)
    return rate / config.reflow_nfe, size
