"""What decides the pairs of each coupling: its options, its inputs, and what its store's recipe says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Inputs, Unfit, call
from nfm.stages.couplings import custom
from nfm.stages.couplings.facts import facts_of
from nfm.stages.display import units
from nfm.stages.trained import costs, student
from nfm.stages.trained.training import blaming
from nfm.storage import ImageDataset
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.format.spec import StoreSpec, pair_fields
from nfm.trainers.nfe import GRIDS, pick_solver

if TYPE_CHECKING:
    from nfm.stages.pairs.config import PairsConfig

MAKERS = ("teacher", "potential", "student")  # what a coupling may be made with, by the word of the recipe
HELD_BYTES, HELD = 4 << 30, 16  # advised for a shard of such a coupling, and bytes a value: image, eps, noise, float32
BALANCED = 0.75  # of the size asked for: what is divided into groups that are alike may be somewhat less


def store_spec(config: PairsConfig, inputs: Inputs, custom_sha256: str | None = None) -> StoreSpec:
    """The recipe that the config and its inputs give. Raises Unfit for options that do not fit the data.

    `custom_sha256` is the digest that a store of a custom coupling has recorded; by default that of the file here.
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
    """The same as far as sizes depend on it, before the inputs are there. Raises Unfit as `store_spec` does."""
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


def _spec(config: PairsConfig, rows: int, fields: Any, **facts: Any) -> StoreSpec:
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
    """For the recipe: what else decides the pairs; of reflow the solver that "auto" stands for."""
    recorded = facts_of(config.coupling).recorded
    return call(recorded, config, custom_sha256) if recorded else None


def minibatch_ot_options(config: PairsConfig, _: str | None) -> dict[str, Any]:
    return {"group_size": config.group_size}


def custom_options(config: PairsConfig, sha256: str | None) -> dict[str, Any]:
    """The function and the digest of its file. Raises Unfit where there is none."""
    return {"function": config.custom, "sha256": sha256 or custom.digest(custom.source_file(config.custom))}


def reflow_options(config: PairsConfig, _: str | None) -> dict[str, Any]:
    """How the student samples. Raises StageError for a solver, an NFE and a grid that do not go together."""
    with blaming("config section [pairs], reflow_solver and reflow_nfe"):
        solver = pick_solver(config.reflow_solver, config.reflow_nfe)
    if config.reflow_grid not in GRIDS:
        raise Unfit(f"pairs.reflow_grid = {config.reflow_grid!r} is unknown; there are {', '.join(GRIDS)}")
    how = {"grid": config.reflow_grid, "guidance": config.reflow_guidance}
    return {"solver": solver, "nfe": config.reflow_nfe, **how}


def maker(config: PairsConfig, inputs: Inputs) -> str | None:
    """The absolute path of what an encoder loads beside the data and the teacher, if anything."""
    facts = facts_of(config.coupling)
    if facts.code:
        return str(custom.source_file(config.custom))
    return str(inputs[facts.made_with].resolve()) if facts.made_with not in (None, "teacher") else None


def small_groups(spec: StoreSpec, inputs: Inputs) -> str | None:
    """A line where the groups that noises are dealt out in are smaller than asked for: a shard has few of a class.

    Slots are in random order, so the first shard speaks for all.
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
        f"groups of {spec.coupling} have {min(sizes)} to {max(sizes)} noises, not pairs.group_size = {wanted}: they "
        f"are of one class and one shard, and a shard has {len(labels):,} records. Larger groups pair better: {remedy}"
    )


def _size(count: int) -> str:
    return units.size(count, digits=2) if count >= 1e9 else units.megabytes(max(count, 1e5))


def pair_flops(config: PairsConfig, facts: Mapping[str, Any]) -> float:
    """FLOPs of one pair from the sizes in the data's `facts` and, where there, the sections `teacher` and `student`.

    Of optimal transport these are the products <x, z>; the assignment, whose time grows as the cube of the group,
    is not in them. 0 where nothing is computed, or where a size is not known.
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
