"""The cost of a store of pairs before it is made: shards, bytes by codec, FLOPs, hours by number of workers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from nfm.stages.couplings.facts import facts_of
from nfm.stages.display import units
from nfm.stages.display.tables import aligned
from nfm.stages.pairs.config import PairsConfig
from nfm.stages.pairs.recipe import pair_flops, planned_spec
from nfm.stages.trained.machine import pick_device
from nfm.stages.trained.teacher import TeacherConfig
from nfm.stages.trained.training import blaming
from nfm.storage import StoreSpec, layouts
from nfm.trainers.models.sizes import check_patch

CODECS = ("float32", "float16", "int8")
INDEX_BYTES = (2500, 13.5)  # of a shard's index part: fixed, and for each record; measured at 64 to 65,536 records
COMMIT_BYTES = 1200
SECONDS = 2.0  # for the timing
_NO_FLOPS = "none: this coupling runs no teacher"


def estimate(
    config: PairsConfig,
    teacher: TeacherConfig,
    facts: Mapping[str, Any],
    workers: Sequence[int],
    rate: float | None,
    committed: int = 0,
) -> dict[str, Any]:
    """The plan of a generation with `committed` pairs done, in JSON's types. Pairs are not counted one by one.

    `facts` describe the data: images, image_shape, and classes and image_dtype if known. `rate` is images per second of
    one worker. If it is None, a teacher with the config's sizes and random weights is timed here, for seconds. Raises
    Unfit for sizes that do not fit together.
    """
    specs = {codec: planned_spec(config, facts, codec) for codec in {*CODECS, config.codec}}
    spec = specs[config.codec]
    pairs = spec.rows * config.draws
    plan: dict[str, Any] = {
        "pairs": pairs,
        "committed": committed,
        "images": spec.rows,
        "draws": config.draws,
        "shards": spec.shards_per_draw * config.draws,
        "rows_per_shard": config.rows_per_shard,
        "layout": config.layout,
        "codec": config.codec,
        "bytes": {codec: bytes_of_draw(specs[codec]) * config.draws for codec in sorted(specs, key=_order)},
    }
    left = pairs - committed
    # no teacher to time: only its products, or nothing, can be stated
    if facts_of(config.coupling).made_with != "teacher":
        flops = pair_flops(config, facts)
        return plan | ({"flops": left * flops, "flops_per_image": flops} if flops else {})
    with blaming("config section [teacher]"):
        check_patch(facts["image_shape"], teacher.patch)
        flops = pair_flops(config, {**facts, "teacher": teacher})
        measured = _given(rate) if rate else _measured(config, teacher, facts)
    seconds = left / measured["images_per_second"]
    return {
        **plan,
        "flops": left * flops,
        "flops_per_image": flops,
        "worker": measured | {"flops_per_second": flops * measured["images_per_second"]},
        "hours": {str(count): float(f"{seconds / count / 3600:.3g}") for count in workers},
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
    if "hours" not in plan:
        flops = f"{plan['flops']:.2g}, {plan['flops_per_image']:.2g} an image" if "flops" in plan else _NO_FLOPS
        return aligned(["of the pairs", ""], [*lines, ["FLOPs", flops]])
    worker = plan["worker"]
    teraflops = units.figure(worker["flops_per_second"] / 1e12, 3)
    lines += [
        ["FLOPs", f"{plan['flops']:.2g}, {plan['flops_per_image']:.2g} an image"],
        ["a worker", f"{units.rate(worker['images_per_second'], 'images')}, {teraflops} TFLOP/s: "
         + worker["how"]],
    ]  # fmt: skip
    hours = [[f"{int(count):,}", units.about(3600 * taken)] for count, taken in plan["hours"].items()]
    return "\n\n".join([aligned(["of the pairs", ""], lines), aligned(["workers", "time"], hours)])


def bytes_of_draw(spec: StoreSpec) -> int:
    """The bytes on disk of one draw: payload, index and commits."""
    whole, rest = divmod(spec.rows, spec.rows_per_shard)
    layout = layouts.of(spec)
    payload = whole * layout.shard_bytes(spec, spec.rows_per_shard) + (layout.shard_bytes(spec, rest) if rest else 0)
    a_shard, a_record = INDEX_BYTES
    return round(payload + spec.shards_per_draw * (a_shard + COMMIT_BYTES) + spec.rows * a_record)


def _given(rate: float) -> dict[str, Any]:
    return {"images_per_second": rate, "how": "as given by --rate"}


def _measured(config: PairsConfig, teacher: TeacherConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Images per second of one worker on this machine. Only one block of the teacher is timed, as all are alike."""
    import torch

    from nfm.stages.encoding import probe
    from nfm.trainers.models.tarflow import TarFlow

    shape, classes, device = facts["image_shape"], facts.get("classes", 0), pick_device(config.device)
    torch.manual_seed(0)
    model = TarFlow(shape, classes, teacher.patch, teacher.channels, 1, teacher.layers, teacher.head_size)
    sizes = [size for size in probe.SIZES if config.batch_size == "auto" or size <= config.batch_size]
    found = probe.for_teacher(
        model.eval().to(device), shape, classes, teacher.eta, device, config.precision, config.threads,
        seconds=SECONDS, sizes=sizes,
    )  # fmt: skip
    cores = f"{config.threads} of {os.cpu_count()} CPU cores"
    on = torch.cuda.get_device_name(device) if device.startswith("cuda") else cores
    return {
        "images_per_second": found.rate / teacher.blocks,
        "batch_size": found.batch_size,
        "precision": config.precision,
        "how": f"measured here, {on}, {config.precision}, batch {found.batch_size}",
    }


def _order(codec: str) -> int:
    return CODECS.index(codec) if codec in CODECS else len(CODECS)
