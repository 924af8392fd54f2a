"""A training in the processes of a launcher: `torchrun ... -m nfm run teacher`, or srun with the same variables.

The first process runs the command; the others follow it, and take part in whatever it trains. Launchers say who is who
by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from nfm.stages.base import Inputs, Reporter, StageError, Unfit
from nfm.stages.trained.devices.machine import pick_device
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import is_remote

PATIENCE = timedelta(days=7)  # the others wait while the first process makes what a training needs


def size() -> int:
    """How many processes the launcher started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is."""
    return _number("RANK", 0)


@contextmanager
def following() -> Iterator[bool]:
    """Around a command: yields True where this process is not the first one, after it did its part of everything."""
    if size() == 1:
        yield False
        return
    _join()
    if rank() > 0:
        _follow()
        yield True
        return
    yield False
    _tell(None)


def lead(train: Callable[..., None], make: Any, config: Any, inputs: Inputs, out: Path, report: Reporter) -> None:
    """`train` together with the processes that follow."""
    _tell((train, make, config, sent(inputs), mirror.origin(out)))
    train(make, config, inputs, out, report, _device(config.device))


def sent(inputs: Inputs) -> dict[str, Path | str]:
    """Inputs as other machines find them: a store where it is, what was brought from a bucket by its URL there."""
    return {role: path if is_remote(path) else mirror.origin(path) for role, path in inputs.items()}


def received(places: Mapping[str, Path | str]) -> dict[str, Path]:
    """What was `sent`, on this machine: artifacts in a bucket are brought here."""
    return {role: Path(mirror.here(place)) if isinstance(place, str) else place for role, place in places.items()}


def _follow() -> None:
    import torch.distributed as dist

    while True:
        told: list[Any] = [None]
        try:
            dist.broadcast_object_list(told, src=0)
        except RuntimeError:  # the first process ended, and has said why
            raise SystemExit(1) from None
        if told[0] is None:
            dist.destroy_process_group()
            return
        train, make, config, places, made = told[0]
        with _listening(Silent()) as report, mirror.beside(made) as out:
            train(make, config, received(places), out, report, _device(config.device))


@contextmanager
def _listening(report: Silent) -> Iterator[Silent]:
    """A launcher passes signals on to all of its processes: whoever hears one first makes all of them stop."""

    def stop(*_: Any) -> None:
        report.stopping = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield report
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(what: Any) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([what], src=0)
    if what is None:
        dist.destroy_process_group()


def _join() -> None:
    from nfm.trainers.training import parallel

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise Unfit(f"WORLD_SIZE is {size()} and {name} is not set: start the command with torchrun, or set it")
    try:
        parallel.join(_device(pick_device("auto")), rank(), size(), "env://", PATIENCE)
    except TimeoutError as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise StageError(f"{error}; is MASTER_ADDR:MASTER_PORT, {at}, an address of the first process?") from error


def _device(name: str) -> str:
    """The device of this process: the one of its number on this machine, where nobody named one."""

    found = pick_device(name)
    return f"cuda:{_number('LOCAL_RANK', 0)}" if found == "cuda" else found


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


class Silent:
    """The reporter of a process that is not the first one: nobody hears it, and others decide when it stops."""

    stopping = ending = False

    def check_lock(self) -> None: ...

    def progress(self, done: int, total: int, unit: str, workers: Any = (), **figures: Any) -> None: ...

    def say(self, text: str) -> None: ...

    def log(self, kind: str, **values: Any) -> None: ...
