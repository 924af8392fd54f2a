"""Compares the same student on the pairs of each coupling: one table over NFE, seeds and metrics, with plots.

It measures nothing itself. It reads the evaluations, the training logs of the students and the manifests of the stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from nfm.stages.base import Inputs, Reporter, Result, Section, StageError, Stopped
from nfm.stages.couplings.variant import Variant
from nfm.stages.evaluation import compare_rows, compare_table
from nfm.storage import PairStore
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic

NAME = "compare"
VERSION = 1
TABLE, TEXT, DISTANCES = "compare.json", "compare.txt", "distances.json"


class CompareConfig(Section):
    """The `[compare]` table: variants of couplings (see `variant`), each trained once with every seed.

    `nfm:soften=0.5@0+1+2` gives a variant its own seeds: for example three for the two closest variants, one for the
    others.
    """

    couplings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field((0,), min_length=1)

    @field_validator("couplings")
    @classmethod
    def _are_variants(cls, couplings: tuple[str, ...]) -> tuple[str, ...]:
        found = [_entry(text) for text in couplings]
        names = [str(variant) for variant, _ in found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is named twice; give all its seeds at once, as {name}@0+1")
        return tuple(
            name + (f"@{'+'.join(map(str, seeds))}" if seeds else "") for name, (_, seeds) in zip(names, found)
        )

    @field_validator("seeds")
    @classmethod
    def _count_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        _check_seeds(seeds)
        return seeds

    def students(self) -> Iterator[tuple[Variant, int]]:
        """(variant, seed) of every student: all students of the first seed, then those of the next."""
        entries = [(variant, seeds or self.seeds) for variant, seeds in map(_entry, self.couplings)]
        for turn in range(max((len(seeds) for _, seeds in entries), default=0)):
            for variant, seeds in entries:
                if turn < len(seeds):
                    yield variant, seeds[turn]


def _entry(text: str) -> tuple[Variant, tuple[int, ...]]:
    """`VARIANT` or `VARIANT@SEED+SEED` as the variant and its own seeds."""
    name, sign, listed = text.partition("@")
    numbers = [part.strip() for part in listed.split("+")] if sign else []
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{text!r}: write the seeds of a variant as {name}@0+1+2")
    seeds = tuple(int(number) for number in numbers)
    _check_seeds(seeds)
    return Variant.parse(name), seeds


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if min(seeds, default=0) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))}: each is a whole number from 0 and counts once")


def run(config: CompareConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Collects `evaluate:VARIANT@SEED`, `evaluate:teacher`, `student:VARIANT@SEED` and `pairs:COUPLING` in
    one table.
    """
    from nfm.stages.evaluation import compare_plots

    stores = same_order(_stores(inputs))
    evaluations = {_name(role): _evaluation(path) for role, path in inputs.items() if role.startswith("evaluate:")}
    students = {_name(role): path for role, path in inputs.items() if role.startswith("student:")}
    body = compare_rows.body(config.students(), evaluations, students, stores)
    body["conclusions"] = compare_table.conclusions(body)
    if report.stopping:
        raise Stopped
    atomic.write_json(out / DISTANCES, compare_rows.distances(body))
    atomic.write_json(out / TABLE, body)
    text = compare_table.as_text(body)
    atomic.write_bytes(out / TEXT, text.encode())
    plots = compare_plots.draw(body)
    for name, picture in plots.items():
        atomic.write_bytes(out / name, picture)
    return Result(payload=[DISTANCES], metrics=compare_rows.figures(body), files=[TABLE, TEXT, *plots])


def check_arrived(role: str, ready: Inputs) -> None:
    """Refuses stores of different orders early, before hours of training that could not be compared."""
    if role.startswith("pairs:"):
        same_order(_stores(ready))


def same_order(stores: Mapping[str, Path]) -> dict[str, Mapping[str, Any]]:
    """The manifests of the stores, by name.

    Raises StageError unless their order keys are equal: compared students must see the same images in the same order.
    """
    manifests = {name: PairStore.open(path).manifest for name, path in stores.items()}
    keys = {name: str(manifest["order_key"]) for name, manifest in manifests.items()}
    if len(set(keys.values())) > 1:
        told = ", ".join(f"{name} {key[:12]}" for name, key in keys.items())
        raise StageError(
            f"the stores differ in their order keys ({told}): their students would not see the same images in the same "
            "order; make all of them from the same data with the same pairs.draws and rows, without excluded shards"
        )
    return manifests


def _stores(inputs: Inputs) -> Inputs:
    return {_name(role): path for role, path in inputs.items() if role.startswith("pairs:")}


def _name(role: str) -> str:
    return role.partition(":")[2]


def _evaluation(folder: Path) -> dict[str, Any]:
    from nfm.stages.evaluation import stage

    try:
        return atomic.read_json(folder / stage.TABLE)
    except StorageError as error:
        raise StageError(f"{error}; remove that evaluation's folder and run the same command again") from error
