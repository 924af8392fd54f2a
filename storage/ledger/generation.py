"""A sealed generation: which shards of each draw it holds, and why it lacks the others.

Nothing in its manifest is believed before it was checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nfm.storage.errors import MissingShard, OutOfRange, StorageError
from nfm.storage.format import untrusted
from nfm.storage.format.moments import check_moments
from nfm.storage.format.order import Rows
from nfm.storage.format.spec import StoreSpec, check_format, parse_name, shard_name
from nfm.storage.ledger.shard_list import MOST, Entry, ShardList, inline_list, read_list
from nfm.storage.ledger.standing import again

PART_OF = "part_of"  # in a manifest of fewer draws than the newest generation had: the number of that one
_MOST_DRAWS = 1000
_NEEDED = {"generation", "draws", "order_key", "content_digest", "records", "shards"}


@dataclass(frozen=True)
class Hole:
    """A shard that a generation lacks."""

    name: str
    slots: range
    reason: str

    @property
    def draw(self) -> int:
        """The draw that lacks it."""
        return parse_name(self.name)[0]

    def to_json(self) -> dict[str, Any]:
        """How a manifest lists it."""
        slots = [self.slots.start, self.slots.stop]
        return {"name": self.name, "slots": slots, "records": len(self.slots), "reason": self.reason}


@dataclass(frozen=True)
class DrawShards:
    """The shards of one draw by their number; `entries` has the existing ones in order."""

    entries: ShardList
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


class Generation:
    """What a manifest says. `body` is the manifest as it is written, with all its keys.

    `shards` are read, and checked, when they are first asked for: a long list stands in a file of its own. Raises
    StorageError for a body that is no manifest, NewerSchema.
    """

    def __init__(self, root: Path, spec: StoreSpec, number: int, body: Mapping[str, Any]) -> None:
        self.root, self.spec, self.number, self.body = root, spec, number, body
        self.path = path = manifest_path(root, number)
        check_format(path, body)
        if missing := _NEEDED - set(body):
            raise StorageError(f"{path}: no manifest of a pair store, it lacks {', '.join(sorted(missing))}")
        if untrusted.integer(f"{path}: generation", body["generation"], 1) != number:
            raise StorageError(f"{path}: is the manifest of generation {body['generation']}; restore it from a copy")
        self.draws = untrusted.integer(f"{path}: draws", body["draws"], 1, _MOST_DRAWS)
        self.records = untrusted.integer(f"{path}: records", body["records"], 1)
        self.order_key = untrusted.sha256(f"{path}: order_key", body["order_key"])
        self.content_digest = untrusted.sha256(f"{path}: content_digest", body["content_digest"])
        if PART_OF in body:
            untrusted.integer(f"{path}: {PART_OF}", body[PART_OF], 1)
        _check_sums(path, body)
        listed = untrusted.sequence(f"{path}: excluded", body.get("excluded", ()), MOST)
        self.excluded = tuple(_hole(f"{path}: excluded", hole) for hole in listed)

    @cached_property
    def shards(self) -> ShardList:
        """The shards that it holds, in order."""
        listed = self.body["shards"]
        if isinstance(listed, Mapping):
            return read_list(self.root, str(self.path), self.number, listed)
        return inline_list(self.path, untrusted.sequence(f"{self.path}: shards", listed, MOST))

    @property
    def bytes(self) -> int:
        """The size of all its payloads."""
        return int(self.shards.numbers("bytes").sum())

    @property
    def complete(self) -> bool:
        """Whether every shard of every draw exists."""
        return not self.excluded

    def checked(self) -> Generation:
        """Itself, once its shards were found to be those of its draws. Raises StorageError, naming its manifest."""
        if problem := self.hole_problem():
            raise StorageError(f"{self.path}: {problem}; run `nfm audit {self.root}`")
        expected = self.expected_names()
        names = self.shards.table["name"]
        if len(names) != len(expected) or not names.combine_chunks().equals(pa.array(expected, pa.string())):
            raise StorageError(
                f"{self.path}: does not list the {len(expected)} shards of {self.draws} draws in order; "
                "run `nfm audit` on its store"
            )
        return self

    def expected_names(self) -> list[str]:
        """The shards that it should list, in order."""
        absent = {hole.name for hole in self.excluded}
        return [name for name in names_of(self.spec, self.draws) if name not in absent]

    def hole_problem(self) -> str | None:
        """What is wrong with its list of excluded shards; None if nothing is."""
        if not self.excluded:
            return None
        names = [hole.name for hole in self.excluded]
        order = {name: number for number, name in enumerate(names_of(self.spec, self.draws))}
        places = [order.get(name, -1) for name in names]
        if -1 in places or places != sorted(set(places)):
            return "does not list its excluded shards once each, in order"
        for hole in self.excluded:
            if self.spec.slots_of(parse_name(hole.name)[1]) != hole.slots:
                return f"its excluded {hole.name} has other slots than the spec gives it"
        held = set(range(self.draws)) - {parse_name(name)[0] for name in order.keys() - set(names)}
        return next((f"its draw {draw} holds no shard" for draw in sorted(held)), None)

    def numbers(self) -> dict[int, Rows] | None:
        """The numbers of the existing shards, ascending, by draw; None if all exist."""
        return None if self.complete else {draw: self._numbers(draw) for draw in range(self.draws)}

    def of(self, draw: int) -> DrawShards:
        """The shards of a draw. Raises OutOfRange if the generation has no such draw."""
        if not 0 <= draw < self.draws:
            raise OutOfRange(f"{self.path}: draw {draw} is outside 0..{self.draws - 1} of generation {self.number}")
        each, absent = self.spec.shards_per_draw, self._absent.get(draw, {})
        start = draw * each - sum(len(self._absent.get(before, ())) for before in range(draw))
        entries = self.shards[start : start + each - len(absent)]
        return DrawShards(entries, self._numbers(draw) if absent else None, absent, f"{self.path}: draw {draw}")

    @cached_property
    def _absent(self) -> dict[int, dict[int, str]]:
        """Why shards are not there, by draw and number."""
        found: dict[int, dict[int, str]] = {}
        for hole in self.excluded:
            found.setdefault(hole.draw, {})[parse_name(hole.name)[1]] = (
                f"its slots {hole.slots.start} to {hole.slots.stop - 1} are excluded from generation {self.number} "
                f"({hole.reason}); {again(self.root)}, and open the generation that is sealed then"
            )
        return found

    def _numbers(self, draw: int) -> Rows:
        every = np.arange(self.spec.shards_per_draw, dtype=np.int64)
        return np.setdiff1d(every, np.array(sorted(self._absent.get(draw, ())), np.int64), assume_unique=True)


def manifest_path(root: Path, number: int) -> Path:
    """Where the manifest of a generation stands."""
    return root / f"manifest.g{number:04d}.json"


def names_of(spec: StoreSpec, draws: int) -> list[str]:
    """The names of all shards of `draws` draws, in order. Raises StorageError for more than two million."""
    if draws * spec.shards_per_draw > MOST:
        raise StorageError(f"{draws} draws of {spec.shards_per_draw} shards are too many for one generation")
    return [shard_name(draw, shard) for draw in range(draws) for shard in range(spec.shards_per_draw)]


def slots_of(holes: Sequence[Hole]) -> list[list[int]]:
    """The missing shards for the order key: draw, first slot, slot after the last."""
    return [[hole.draw, hole.slots.start, hole.slots.stop] for hole in holes]


def _check_sums(path: Path, body: Mapping[str, Any]) -> None:
    """Checks the keys that sum up the commits, of which older generations lack some."""
    if "moments" in body:
        check_moments(f"{path}: moments", body["moments"])
    for key in ("bytes", "shard_count", "clipped"):
        if key in body:
            untrusted.integer(f"{path}: {key}", body[key])
    if body.get("noise_error") is not None and untrusted.real(f"{path}: noise_error", body["noise_error"]) < 0:
        raise StorageError(f"{path}: noise_error {body['noise_error']} is negative; restore it from a copy")
    for precision in untrusted.sequence(f"{path}: precision", body.get("precision", ()), 1000):
        untrusted.text(f"{path}: precision", precision)
    for size in untrusted.sequence(f"{path}: batch_sizes", body.get("batch_sizes", ()), MOST):
        untrusted.integer(f"{path}: batch_sizes", size)


def _hole(where: str, stated: Any) -> Hole:
    body = untrusted.mapping(f"{where}: an excluded shard", stated)
    if missing := {"name", "slots", "records", "reason"} - set(body):
        raise StorageError(f"{where}: a shard lacks {', '.join(sorted(missing))}; restore it from a copy")
    name = untrusted.text(f"{where}: the name of a shard", body["name"], most=40)
    parse_name(name)
    slots = [untrusted.integer(f"{where}: slots", slot) for slot in untrusted.sequence(where, body["slots"], 2)]
    if len(slots) != 2 or untrusted.integer(f"{where}: records", body["records"], 1) != slots[1] - slots[0]:
        raise StorageError(f"{where}: {name}: its slots and records contradict each other; restore it from a copy")
    return Hole(name, range(*slots), untrusted.text(f"{where}: reason", body["reason"]))
