"""Where the iterations of a dataset begin, shared by the processes that read it together.

A DataLoader tells its dataset nothing. Its workers are copies, which are new for each iteration or kept. So the starts
of iterations are in shared memory: the first worker of an iteration writes its start, the others read it.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

import torch

from nfm.storage.errors import StorageError

_KEPT = 32  # iterations whose workers may not have begun yet
_WORKERS = 1024


class Start(NamedTuple):
    """`first` is the first epoch of an iteration, which continues after `consumed` records of `epoch`.

    A state saved by one of several workers counts only its own batches. It is for worker `worker` of `workers` only.
    """

    first: int
    epoch: int
    consumed: int = 0
    worker: int = 0
    workers: int = 1


class Starts:
    """The iterations that were begun, and the requested start of the next one. All workers share it.

    A copy that is pickled, except to start a process, counts for itself from then on.
    """

    def __init__(self) -> None:
        self._asked = torch.full((1 + len(Start._fields),), 0).share_memory_()  # whether, and what
        self._begun = torch.zeros(1, dtype=torch.int64).share_memory_()
        # A row for each iteration: its name, its last epoch, its start, and which workers have begun it.
        self._rows = torch.zeros(_KEPT, 3 + len(Start._fields), dtype=torch.int64).share_memory_()
        self._here = torch.zeros(_KEPT, _WORKERS, dtype=torch.bool).share_memory_()
        self._lock = multiprocessing.get_context("fork").Lock()  # unlike spawn's, it needs no helper process
        self._spawns = False

    def ask(self, start: Start) -> None:
        """Requests that the next iteration starts there."""
        with self._lock:
            self._asked.copy_(torch.tensor([1, *start]))

    @property
    def asked(self) -> Start | None:
        """The requested start that has not been used yet."""
        with self._lock:
            there, *start = self._asked.tolist()
        return Start(*start) if there else None

    @property
    def next_epoch(self) -> int:
        """The first epoch of the next iteration."""
        with self._lock:
            return self._next().first

    def begin(self, epochs: int | None, own: Start | None = None) -> tuple[Start, int]:
        """The start of a new iteration of `epochs` epochs, and its number."""
        with self._lock:
            return self._add((0, 0), epochs, own)

    def join(self, name: tuple[int, int], worker: int, epochs: int | None, own: Start | None) -> tuple[Start, int]:
        """As `begin`, for a worker of the iteration with this name. `own` is the start in this worker's own state."""
        if worker >= _WORKERS:
            raise StorageError(f"num_workers is above {_WORKERS}: pass less")
        with self._lock:
            begun = int(self._begun)
            for number in range(begun - 1, max(-1, begun - 1 - _KEPT), -1):
                row = self._rows[number % _KEPT].tolist()
                # A name repeats if the loader's seed does. But a worker begins each iteration only once.
                if (row[0], row[1]) == name and not self._here[number % _KEPT, worker]:
                    start = own or Start(*row[3:])
                    break
            else:
                start, number = self._add(name, epochs, own)
            self._here[number % _KEPT, worker] = True
        return start, number

    def reached(self, number: int, epoch: int) -> None:
        """Records that the endless iteration `number` has reached this epoch."""
        with self._lock:
            if int(self._begun) - number <= _KEPT:
                row = self._rows[number % _KEPT]
                row[2] = max(int(row[2]), epoch)

    def _next(self) -> Start:
        there, *asked = self._asked.tolist()
        if there:
            return Start(*asked)
        begun = int(self._begun)
        first = int(self._rows[(begun - 1) % _KEPT, 2]) + 1 if begun else 0
        return Start(first, first)

    def _add(self, name: tuple[int, int], epochs: int | None, own: Start | None) -> tuple[Start, int]:
        start, number = own or self._next(), int(self._begun)
        last = start.epoch if epochs is None else start.first + epochs - 1
        self._rows[number % _KEPT] = torch.tensor([*name, last, *start])
        self._here[number % _KEPT] = False
        self._asked[0] = 0
        self._begun += 1
        return start, number

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is None:
            return self.__dict__ | {"_lock": None}
        if not self._spawns:  # a spawned process cannot take the fork lock; forked ones take this one too
            self._lock, self._spawns = multiprocessing.get_context("spawn").Lock(), True
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._lock is None:
            shared = {name: value.clone().share_memory_() for name, value in state.items() if torch.is_tensor(value)}
            self.__dict__.update(shared)
            self._lock, self._spawns = multiprocessing.get_context("fork").Lock(), False
