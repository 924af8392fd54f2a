"""What decides the pairs of each coupling: its options, its inputs, and the recipe of its store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Inputs, Unfit, call
from nfm.stages.couplings import custom
from nfm.stages.couplings.facts import FACTS, facts_of
from nfm.stages.display import units
from nfm.stages.trained import costs, student
from nfm.stages.trained.training.section import blaming
from nfm.storage import ImageDataset
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.format.codecs import CODECS
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec
from nfm.trainers.nfe import COSTS, GRIDS, STOCHASTIC, pick_solver

if TYPE_CHECKING:
    from nfm.stages.pairs.config import PairsConfig

MAKERS = ("teacher", "potential", "student")  # what a coupling may be made with, by its name in the recipe
# advised for a shard of such a coupling, and bytes for each value: image, eps, noise, float32
HELD_BYTES, HELD = 4 << 30, 16
BALANCED = 0.75  # of the requested size: equal groups may be somewhat smaller


def store_spec(config: PairsConfig, inputs: Inputs, custom_sha256: str | None = None) -> StoreSpec:
    """The recipe that follows from the config and its inputs. Raises Unfit for options that do not fit the data.

    `custom_sha256` is the digest recorded by a store of a custom coupling; by default that of the file here.
    """
    source = ImageDataset.open(inputs["data"], "train")
    check_flips(config, source.dtype)
    facts: dict[str, Any] = {"eta": None, "sigma_f": None}
    if "teacher" in inputs:
        facts = atomic.read_json(inputs["teacher"] / "teacher.json")
    made_with = {role: content(inputs[role]) for role in MAKERS if role in inputs}
    return _spec(
        config,
        len(source),
        pair_fields(source.image_shape, config.codec, source.dtype, label=bool(source.classes)),
        source=content(inputs["data"]),
        codec=config.codec,
        value_range=source.value_range,
        image_scale=source.image_scale,
        image_shift=source.image_shift,
        image_decoder=source.image_decoder,
        flips=config.flips,
        seed=config.seed,
        eta=facts["eta"],
        sigma_f=facts["sigma_f"],
        coupling_options=options(config, custom_sha256),
        classes=len(source.classes) or None,
        **made_with,
    )


def planned_spec(config: PairsConfig, facts: Mapping[str, Any], codec: str) -> StoreSpec:
    """The same before the inputs exist, as far as sizes need it. Raises Unfit as `store_spec` does."""
    dtype = facts.get("image_dtype", "uint8")
    check_flips(config, dtype)
    fields = pair_fields(tuple(facts["image_shape"]), codec, dtype, label=bool(facts.get("classes", 1)))
    return _spec(config, facts["images"], fields, source="planned", codec=codec)


def check_flips(config: PairsConfig, image_dtype: str) -> None:
    """Raises Unfit for flips of latents."""
    if config.flips and image_dtype != "uint8":
        raise Unfit(
            "pairs.flips = true: these images are latents, and a flipped latent is not the latent of the flipped "
            "image. Encode flipped images into the data set as rows of their own, and leave pairs.flips out"
        )


def check_codec(config: PairsConfig, codec: str) -> None:
    """Raises Unfit for a codec that makes the noise again where the coupling's is no function of the seed."""
    if CODECS[codec].made and not facts_of(config.coupling).gaussian:
        able = ", ".join(name for name, facts in FACTS.items() if facts.gaussian)
        raise Unfit(
            f"pairs.codec = {codec!r}: the noise of coupling {config.coupling} is no function of the seed, so it must "
            f"be stored; take another codec, or a coupling whose noise is drawn: {able}"
        )


def _spec(config: PairsConfig, rows: int, fields: Any, **facts: Any) -> StoreSpec:
    check_codec(config, facts["codec"])
    try:
        return StoreSpec(
            rows=rows,
            rows_per_shard=config.rows_per_shard,
            rows_per_block=config.rows_per_block,
            fields=fields,
            coupling=config.coupling,
            layout=config.layout,
            **facts,
        )
    except StorageError as error:
        raise Unfit(f"config section [pairs]: {error}") from error


def options(config: PairsConfig, custom_sha256: str | None = None) -> dict[str, Any] | None:
    """What else decides the pairs, for the recipe. For reflow it has the solver that "auto" means."""
    recorded = facts_of(config.coupling).recorded
    return call(recorded, config, custom_sha256) if recorded else None


def minibatch_ot_options(config: PairsConfig, _: str | None) -> dict[str, Any]:
    return {"group_size": config.group_size}


def custom_options(config: PairsConfig, sha256: str | None) -> dict[str, Any]:
    """The function and the digest of its file. Raises Unfit where it cannot be called as it is said to be."""
    if sha256 is None:
        file = custom.source_file(config.custom)
        custom.check(file, str(config.custom))
        sha256 = custom.digest(file)
    return {"function": config.custom, "sha256": sha256}


def reflow_options(config: PairsConfig, _: str | None) -> dict[str, Any]:
    """How the student samples. Raises StageError if solver, NFE and grid do not fit together."""
    with blaming("config section [pairs], reflow_solver and reflow_nfe"):
        solver = pick_solver(config.reflow_solver, config.reflow_nfe)
    if solver in STOCHASTIC:
        raise Unfit(
            f"pairs.reflow_solver = {solver!r}: it adds noise on its way, so an image is no function of the noise that "
            f"it began with; take {', '.join(name for name in COSTS if name not in STOCHASTIC)}"
        )
    if config.reflow_grid not in GRIDS:
        raise Unfit(f"pairs.reflow_grid = {config.reflow_grid!r} is unknown; there are {', '.join(GRIDS)}")
    how = {"grid": config.reflow_grid, "guidance": config.reflow_guidance}
    return {"solver": solver, "nfe": config.reflow_nfe, **how}


def maker(config: PairsConfig, inputs: Inputs) -> str | None:
    """The absolute path of what an encoder loads besides the data and the teacher, if anything."""
    facts = facts_of(config.coupling)
    if facts.code:
        return str(custom.source_file(config.custom))
    return mirror.origin(inputs[facts.made_with]) if facts.made_with not in (None, "teacher") else None


def small_groups(spec: StoreSpec, inputs: Inputs) -> str | None:
    """A warning if the groups in which noises are dealt are smaller than requested, because a shard has few of a class.

    Slots are in random order, so the first shard is typical.
    """
    if facts_of(spec.coupling).noise != "dealt":
        return None
    from nfm.trainers.couplings.minibatch_ot import groups

    first = spec.slots_of(0)
    labels = ImageDataset.open(inputs["data"], "train").labels(np.arange(first.start, first.stop))
    wanted, classes = int((spec.coupling_options or {})["group_size"]), len(np.unique(labels))
    sizes = [len(members) for members in groups(labels, wanted)]
    enough = min(wanted * classes, spec.rows)
    if max(sizes) >= BALANCED * wanted or enough <= spec.rows_per_shard:
        return None
    record = HELD * math.prod(spec.image_shape)
    most = min(enough, HELD_BYTES // record)
    remedy = (
        f"set pairs.rows_per_shard to about {most:,}; a worker holds its shard in memory, {_size(most * record)} then"
        if most > spec.rows_per_shard
        else f"but larger shards, which a worker holds in memory, would take more than {_size(HELD_BYTES)}"
    )
    return (
        f"groups of {spec.coupling} have {min(sizes)} to {max(sizes)} noises in the first shard, not "
        f"pairs.group_size = {wanted}: they are of one class and one shard, and a shard has "
        f"{len(labels):,} records. Larger groups pair better: {remedy}"
    )


def _size(count: int) -> str:
    return units.size(count, digits=2) if count >= 1e9 else units.megabytes(max(count, 1e5))


def pair_flops(config: PairsConfig, facts: Mapping[str, Any]) -> float:
    """FLOPs of one pair, from the sizes in the `facts` of the data and, if given, in the sections `teacher` and
    `student`.

    For optimal transport it counts the products <x, z> but not the assignment, whose time grows as the cube of the
    group. It is 0 if nothing is computed or a size is unknown.
    """
    flops = facts_of(config.coupling).flops
    return float(call(flops, config, facts)) if flops else 0.0


def nfm_flops(config: PairsConfig, facts: Mapping[str, Any]) -> float:
    teacher = facts["teacher"]
    return costs.teacher_flops(facts["image_shape"], teacher) if teacher.model is None else 0.0


def minibatch_ot_flops(config: PairsConfig, facts: Mapping[str, Any]) -> float:
    group = min(config.group_size, config.rows_per_shard // _classes(facts))
    return 2.0 * math.prod(facts["image_shape"]) * max(1, group)


def semidiscrete_ot_flops(config: PairsConfig, facts: Mapping[str, Any]) -> float:
    return 2.0 * math.prod(facts["image_shape"]) * facts["images"] / _classes(facts)


def reflow_flops(config: PairsConfig, facts: Mapping[str, Any]) -> float:
    if "student" not in facts:
        return 0.0
    passes = config.reflow_nfe * (2 if config.reflow_guidance else 1)
    return passes * student.flops(facts["student"], facts["image_shape"])


def _classes(facts: Mapping[str, Any]) -> int:
    return max(int(facts.get("classes", 1)), 1)


def content(folder: Path) -> str:
    """The content digest of a finished artifact."""
    return atomic.read_json(folder / "manifest.json")["content_digest"]
