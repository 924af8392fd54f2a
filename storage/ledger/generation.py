"""Which shards of each draw a generation holds: all of them, or all but those that its manifest lists as excluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from nfm.storage.errors import MissingShard, StorageError
from nfm.storage.format.order import Rows
from nfm.storage.format.spec import StoreSpec, parse_name
from nfm.storage.ledger.seal import names_of
from nfm.storage.ledger.shard_list import Entry, ShardList, texts


@dataclass(frozen=True)
class DrawShards:
    """The shards of one draw by their number; `entries` has the existing ones in order."""

    entries: Sequence[Entry]
    numbers: Rows | None  # of the entries; None means all, from 0
    absent: Mapping[int, str]  # why the others are missing
    where: str

    def __getitem__(self, number: int) -> Entry:
        """The entry of a shard. Raises MissingShard if the generation lacks it."""
        if self.numbers is None:
            return self.entries[number]
        at = int(np.searchsorted(self.numbers, number))
        if at == len(self.numbers) or self.numbers[at] != number:
            raise MissingShard(f"{self.where}, shard {number}: {self.absent.get(number, 'there is no such shard')}")
        return self.entries[at]


class Presence:
    """The shards of a generation, by draw. Raises StorageError if a manifest does not list what it should."""

    def __init__(self, where: str, spec: StoreSpec, manifest: Mapping[str, Any]) -> None:
        self._where, self._spec = where, spec
        self._shards: Sequence[Entry] = manifest["shards"]
        self._draws = int(manifest["draws"])
        self._generation = int(manifest["generation"])
        self._absent: dict[int, dict[int, str]] = {}
        expected = expected_names(spec, manifest)
        if not _are(self._shards, expected):
            raise StorageError(
                f"{where}: does not list the {len(expected)} shards of {self._draws} draws in order; "
                "run `nfm audit` on its store"
            )
        for hole in manifest.get("excluded", ()):
            draw, shard = parse_name(hole["name"])
            reason = (
                f"its slots {hole['slots'][0]} to {hole['slots'][1] - 1} are excluded from generation "
                f"{self._generation} ({hole['reason']}); run the pairs stage again to encode them, "
                "and open the generation that it seals"
            )
            self._absent.setdefault(draw, {})[shard] = reason

    @property
    def complete(self) -> bool:
        """Whether every shard of every draw exists."""
        return not self._absent

    def numbers(self) -> dict[int, Rows] | None:
        """The numbers of the existing shards, ascending, by draw; None if all exist."""
        return None if self.complete else {draw: self._numbers(draw) for draw in range(self._draws)}

    def of(self, draw: int) -> DrawShards:
        """The shards of a draw. Raises StorageError if the generation has no such draw."""
        if not 0 <= draw < self._draws:
            raise StorageError(
                f"{self._where}: draw {draw} is outside 0..{self._draws - 1} of generation {self._generation}"
            )
        each = self._spec.shards_per_draw
        lacking = sum(len(self._absent.get(before, ())) for before in range(draw))
        absent = self._absent.get(draw, {})
        start = draw * each - lacking
        entries = self._shards[start : start + each - len(absent)]
        numbers = self._numbers(draw) if absent else None
        return DrawShards(entries, numbers, absent, f"{self._where}: draw {draw}")

    def _numbers(self, draw: int) -> Rows:
        every = np.arange(self._spec.shards_per_draw, dtype=np.int64)
        return np.setdiff1d(every, np.array(sorted(self._absent.get(draw, ())), np.int64), assume_unique=True)


def expected_names(spec: StoreSpec, manifest: Mapping[str, Any]) -> list[str]:
    """The shards that a manifest should list, in order."""
    absent = {hole["name"] for hole in manifest.get("excluded", ())}
    return [name for name in names_of(spec, manifest["draws"]) if name not in absent]


def excluded_problems(spec: StoreSpec, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the list of excluded shards in a manifest."""
    holes = manifest.get("excluded", ())
    if not holes:
        return []
    names = [hole["name"] for hole in holes]
    order = {name: number for number, name in enumerate(names_of(spec, manifest["draws"]))}
    places = [order.get(name, -1) for name in names]
    if -1 in places or places != sorted(set(places)):
        return ["does not list its excluded shards once each, in order"]
    for hole in holes:
        slots = spec.slots_of(parse_name(hole["name"])[1])
        if [slots.start, slots.stop] != list(hole["slots"]):
            return [f"its excluded {hole['name']} has other slots than the spec gives it"]
    held = set(range(manifest["draws"])) - {parse_name(name)[0] for name in order.keys() - set(names)}
    return [f"its draw {draw} holds no shard" for draw in sorted(held)]


def _are(shards: Sequence[Entry], expected: list[str]) -> bool:
    if isinstance(shards, ShardList):
        return len(shards) == len(expected) and bool(
            shards.table["name"].combine_chunks().equals(pa.array(expected, pa.string()))
        )
    return texts(shards, "name") == expected
