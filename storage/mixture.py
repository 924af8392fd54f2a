"""Several stores as one stream, with weights: 80 % NFM pairs and 20 % independent ones, say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from nfm.storage.format.order import Rows, Shuffle
from nfm.storage.reading.reader import BatchReader, ReadOptions
from nfm.storage.reading.selection import Filter
from nfm.storage.reading.stream import Records, StoreStream

if TYPE_CHECKING:
    from nfm.storage.reading.torch_dataset import TorchBatches
    from nfm.storage.store import PairStore

_FINEST = 10_000  # weights are fractions with at most this denominator, so that shares are exact


class Mixture:
    """Stores that are read as one: `Mixture([(nfm, 0.8), (independent, 0.2)]).batches(...)`.

    Every batch holds the members' shares, to a record. Members of the same source data (equal order keys) are
    aligned: an epoch has every slot once, in the order of any one of them, and only the store it is read from is
    the mixture's choice. Other members go each through its own epochs, and an epoch of the mixture has as many
    records as theirs together.
    """

    def __init__(self, members: Sequence[tuple[PairStore, float]]) -> None:
        if not members:
            raise ValueError("a mixture of no stores: pass [(store, weight), ...]")
        self.stores = [store for store, _ in members]
        self.weights = _shares([weight for _, weight in members])

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: Shuffle = "full",
        window: int = 16,
        filter: Filter | None = None,
        **options: Unpack[ReadOptions],
    ) -> BatchReader:
        """Batches of the mixture; the arguments are those of `PairStore.batches`, a filter holds for every member."""
        return BatchReader(self.stream(seed, shuffle, window, filter), batch_size, epochs, **options)

    def as_torch_dataset(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: Shuffle = "full",
        window: int = 16,
        filter: Filter | None = None,
        **options: Unpack[ReadOptions],
    ) -> TorchBatches:
        """The same batches as an IterableDataset: `DataLoader(dataset, batch_size=None, num_workers=any)`."""
        from nfm.storage.reading.torch_dataset import TorchBatches

        return TorchBatches(self.stream(seed, shuffle, window, filter), batch_size, epochs, **options)

    def stream(self, seed: int, shuffle: Shuffle, window: int, filter: Filter | None) -> MixtureStream:
        """The order of the records that a reader follows."""
        return MixtureStream([store.stream(seed, shuffle, window, filter) for store in self.stores], self.weights)


class MixtureStream:
    """The members' streams, dealt out position by position."""

    def __init__(self, members: Sequence[StoreStream], weights: Sequence[Fraction]) -> None:
        self.members = members
        self.weights = weights
        self.sources = [member.source for member in members]
        self.aligned = len({(member.order_key, len(member.draws)) for member in members}) == 1
        self.least = members[0].least if self.aligned else sum(member.rows(0) for member in members)
        # The window that is over first: no member is asked for more than one of its windows ahead.
        ahead = [int(member.lookahead / (1 if self.aligned else weight)) for member, weight in zip(members, weights)]
        self.lookahead = min((positions for positions in ahead if positions), default=0)

    @property
    def identity(self) -> Mapping[str, Any]:
        each = [member.identity for member in self.members]
        own = {name: [one[name] for one in each] for name in ("order_key", "content_digest", "generation", "filter")}
        return {**each[0], **own, "weights": [float(weight) for weight in self.weights]}

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
    """(member, turn) of each position: who gets it, and how many it got before. Weights add up to 1.

    Member 0 gets position p when floor((p + 1) w) > floor(p w); what is left is dealt to the others alike. So any n
    positions in a row hold n w of each member, give or take one for each member before it.
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
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights are {list(weights)}: each must be a number above 0")
    total = sum(map(Fraction, weights))
    shares = [(Fraction(weight) / total).limit_denominator(_FINEST) for weight in weights]
    # One denominator for all keeps the products of `deal` far inside 64 bits, whatever the weights.
    if sum(shares) != 1 or math.lcm(*(share.denominator for share in shares)) > _FINEST:
        ends = [round(_FINEST * sum(map(Fraction, weights[: n + 1])) / total) for n in range(len(weights))]
        shares = [Fraction(end - start, _FINEST) for start, end in pairwise([0, *ends])]
    if min(shares) <= 0:
        raise ValueError(f"weights are {list(weights)}: the smallest is below 1/{_FINEST} of them all; leave it out")
    return shares


def _through_epochs(member: StoreStream, turns: Rows) -> tuple[Rows, Rows, Rows]:
    """(draw, slot, epoch) of a member's records, counted on through its epochs; turns ascend."""
    draw, slot = np.empty_like(turns), np.empty_like(turns)
    cycle = np.cumsum([member.rows(epoch) for epoch in range(len(member.draws))])  # then its draws begin again
    rounds, inside = np.divmod(turns, cycle[-1])
    which = np.searchsorted(cycle, inside, side="right")
    epochs = rounds * len(cycle) + which
    positions = inside - np.concatenate([[0], cycle[:-1]])[which]
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        _, draw[here], slot[here], _ = member.at(epoch, positions[here])
    return draw, slot, epochs
