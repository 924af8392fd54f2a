"""Reads several stores as one stream with weights, for example 80 % NFM pairs and 20 % independent ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from nfm.storage.errors import Misused
from nfm.storage.errors.arguments import WrongArgument, checked, instance, real, wrong
from nfm.storage.format.order import Rows, Shuffle
from nfm.storage.reading.selection import Filter
from nfm.storage.reading.stream import Records, StoreStream
from nfm.storage.store import PairStore, Readable

_STORE = instance(PairStore)
_WEIGHT = real("a number above 0", lambda weight: weight > 0)
_FINEST = 10_000  # weights are fractions with at most this denominator, so that shares are exact
_ROUNDING = 1e-6  # of shares such as three times 1/3


def _members(name: str, value: Any) -> list[tuple[PairStore, float]]:
    """Checks a list of (store, weight)."""
    must = "a list of pairs (store, weight) such as [(nfm, 0.8), (independent, 0.2)]"
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    members = list(value) if listed else []
    if not members:
        raise wrong(name, value, must)
    for member in members:
        if not isinstance(member, tuple | list) or len(member) != 2:
            raise wrong(name, member, must)
    return [(_STORE("a mixture's member", store), _WEIGHT("a weight", weight)) for store, weight in members]


def _check_aligned(stores: Sequence[PairStore]) -> None:
    """Raises StorageError unless the stores read the same images in the same order.

    Otherwise an epoch would have one image twice and another one not at all.
    """
    first: dict[str, PairStore] = {}
    for store in stores:
        other = first.setdefault(store.spec.source, store)
        if other.order_key != store.order_key:
            facts = [(each.draws, len(each), len(each.excluded)) for each in (other, store)]
            told = [f"{draws} draws of {rows} rows, {out} shards excluded" for draws, rows, out in facts]
            raise Misused(
                f"{store.root}: {told[1]}, and {other.root}: {told[0]}. Both are of the same images, and a mixture of "
                "them would not have every image once an epoch: make them with the same draws and rows, complete them, "
                "or open with generation= one that has as many draws"
            )


class Mixture(Readable):
    """Stores that are read as one: `Mixture([(nfm, 0.8), (independent, 0.2)]).batches(...)`.

    The weights are shares that sum to 1, or whole numbers: 4 and 1 mean 0.8 and 0.2. Every batch has these shares, up
    to one record. A share of less than one record an epoch is refused for members with the same source data.

    Members with the same source data are aligned: an epoch has every slot once, in the order that each member has
    alone. The mixture only chooses from which store a slot is read. Such members must have the same rows and draws,
    else StorageError is raised.

    Members with different data each go through their own epochs. So do members of which a filter keeps different
    records. Then an epoch of the mixture has as many records as all members together, and a small member begins its
    next epoch, with its next draw, before a large one has ended its first.
    """

    @checked(members=_members)
    def __init__(self, members: Sequence[tuple[PairStore, float]]) -> None:
        self.stores = [store for store, _ in members]
        self.weights = _shares([weight for _, weight in members])
        _check_aligned(self.stores)

    @checked()
    def stream(self, seed: int, shuffle: Shuffle, window: int, filter: Filter | None) -> MixtureStream:
        """The order of records that a reader follows."""
        return MixtureStream([store.stream(seed, shuffle, window, filter) for store in self.stores], self.weights)


class MixtureStream:
    """The streams of the members, combined position by position."""

    def __init__(self, members: Sequence[StoreStream], weights: Sequence[Fraction]) -> None:
        self.members = members
        self.weights = weights
        self.sources = [member.source for member in members]
        self.aligned = len({(member.order_key, len(member.draws)) for member in members}) == 1
        if self.aligned and min(weights) * members[0].least < 1:
            raise WrongArgument(
                "weights",
                f"are {list(map(float, weights))}: {float(min(weights)):g} of the {members[0].least} records of an "
                f"epoch is less than one; the smallest share is 1/{members[0].least}, raise it or leave it out",
            )
        self.least = members[0].least if self.aligned else sum(member.rows(0) for member in members)
        self.most = members[0].most if self.aligned else self.least
        # The member that ends its window first decides: no member reads more than one of its windows ahead.
        ahead = [int(member.lookahead / (1 if self.aligned else weight)) for member, weight in zip(members, weights)]
        self.lookahead = min((positions for positions in ahead if positions), default=0)

    @property
    def identity(self) -> Mapping[str, Any]:
        each = [member.identity for member in self.members]
        own = {name: [one[name] for one in each] for name in ("order_key", "content_digest", "generation", "filter")}
        return {**each[0], **own, "weights": [float(weight) for weight in self.weights]}

    @property
    def period(self) -> int:
        return self.members[0].period if self.aligned else 1

    def rows(self, epoch: int) -> int:
        return self.members[0].rows(epoch) if self.aligned else self.least

    def at(self, epoch: int, positions: Rows) -> Records:
        store, turn = deal(positions if self.aligned else epoch * self.least + positions, self.weights)
        if self.aligned:
            return self.members[0].at(epoch, positions)._replace(store=store)
        found = Records(store, *(np.empty_like(store) for _ in range(3)))
        for number, member in enumerate(self.members):
            here = np.flatnonzero(store == number)
            found.draw[here], found.slot[here], found.epoch[here] = _through_epochs(member, turn[here])
        return found


def deal(positions: Rows, weights: Sequence[Fraction]) -> tuple[Rows, Rows]:
    """For each position: the member that it belongs to, and how many earlier positions that member has. Weights sum to
    1.

    Member 0 gets position p if floor((p + 1) w) > floor(p w). The remaining positions are divided among the other
    members in the same way. So any n positions in a row have n w of each member, plus or minus one for each member
    before it.
    """
    store, turn, left = np.zeros_like(positions), np.zeros_like(positions), np.arange(len(positions))
    at, rest = np.asarray(positions, np.int64), Fraction(1)
    for number, weight in enumerate(weights):
        share = weight / rest
        before = at * share.numerator // share.denominator
        mine = (at + 1) * share.numerator // share.denominator > before
        store[left[mine]], turn[left[mine]] = number, before[mine]
        left, at, rest = left[~mine], (at - before)[~mine], rest - weight
    return store, turn


def _shares(weights: Sequence[float]) -> list[Fraction]:
    total = sum(map(Fraction, weights))
    if abs(float(total) - 1) > _ROUNDING and not all(float(weight).is_integer() for weight in weights):
        raise WrongArgument(
            "weights",
            f"are {list(weights)}, their sum is {float(total):.6g}: shares sum to 1, or give ratios as whole numbers "
            "such as 4 and 1",
        )
    shares = [(Fraction(weight) / total).limit_denominator(_FINEST) for weight in weights]
    # With one common denominator, the products in `deal` stay far inside 64 bits, whatever the weights.
    if sum(shares) != 1 or math.lcm(*(share.denominator for share in shares)) > _FINEST:
        ends = [round(_FINEST * sum(map(Fraction, weights[: n + 1])) / total) for n in range(len(weights))]
        shares = [Fraction(end - start, _FINEST) for start, end in pairwise([0, *ends])]
    if min(shares) <= 0:
        raise WrongArgument("weights", f"are {list(weights)}: the smallest is below 1/{_FINEST} of all; leave it out")
    return shares


def _through_epochs(member: StoreStream, turns: Rows) -> tuple[Rows, Rows, Rows]:
    """(draw, slot, epoch) of a member's records, counted through all its epochs. `turns` must ascend."""
    draw, slot = np.empty_like(turns), np.empty_like(turns)
    cycle = np.cumsum([member.rows(epoch) for epoch in range(len(member.draws))])  # after these, its draws begin again
    rounds, inside = np.divmod(turns, cycle[-1])
    which = np.searchsorted(cycle, inside, side="right")
    epochs = rounds * len(cycle) + which
    positions = inside - np.concatenate([[0], cycle[:-1]])[which]
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        _, draw[here], slot[here], _ = member.at(epoch, positions[here])
    return draw, slot, epochs
