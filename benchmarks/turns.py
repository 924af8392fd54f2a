"""Rates of trainings: our loop, in turns with a peer's where there is one, on the same batches in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

WARM = 3  # steps of each before its time counts


class Peer(Protocol):
    """A peer's training of a case."""

    model: nn.Module
    stand_ins: list[str]

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None: ...

    def losses(self, image: Tensor, label: Tensor) -> tuple[float, float]: ...


class Turns:
    """Batches for our loop that never end; before each round's, the peer trains on the same ones."""

    def __init__(
        self, batches: Sequence[Any], peer: Peer | None, rounds: int, seconds: float, clock: Callable[[], float]
    ) -> None:
        self._batches, self._peer, self._rounds, self._seconds, self._clock = batches, peer, rounds, seconds, clock
        self.ours: list[float] = []  # images a second, a round
        self.theirs: list[float] = []
        self.steps, self.over = 0, False

    def __iter__(self) -> Iterator[Any]:
        yield from self._some(WARM)
        began = self._wait()
        yield self._batches[0]
        took = self._wait() - began
        if self._peer is not None:
            self._peer.train(self._pairs(WARM))
        self.steps = max(1, round(self._seconds / took))
        for _ in range(self._rounds):
            if self._peer is not None:
                began = self._wait()
                self._peer.train(self._pairs(self.steps))
                self.theirs.append(self._rate(began))
            began = self._wait()
            yield from self._some(self.steps)
            self.ours.append(self._rate(began))
        self.over = True
        yield self._batches[0]  # the loop hears of the end after one more step

    def _some(self, steps: int) -> Iterator[Any]:
        return (self._batches[step % len(self._batches)] for step in range(steps))

    def _pairs(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.image, batch.label) for batch in self._some(steps))

    def _wait(self) -> float:
        """The time, when the device has done all that it was given."""
        if self._batches[0].image.is_cuda:
            torch.cuda.synchronize()
        return self._clock()

    def _rate(self, began: float) -> float:
        return self.steps * len(self._batches[0].image) / (self._wait() - began)
