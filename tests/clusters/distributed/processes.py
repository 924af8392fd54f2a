"""New processes for these tests, forked from one that has already imported torch.

Four imports of torch at once would slow down a small machine.

Each call of a function runs in its own process. The process that failed first is shown first: the errors of the others
are mostly that it closed the connection.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.support.forkserver import context
from tests.support.patience import PATIENCE

_LAST_WORDS = 5.0  # seconds that the others have once one of them failed


def run(
    target: Callable[..., None], folder: Path, calls: Mapping[str, tuple[Any, ...]], patience: float = PATIENCE
) -> None:
    """`target` of the arguments of each call, all at once; fails with the stderr of those that did not end well."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"stderr.{name}" for name in calls}
    running: dict[str, BaseProcess] = {}
    try:
        for name, arguments in calls.items():
            files[name].touch()
            running[name] = context.Process(target=_child, args=(files[name], target, arguments))
            running[name].start()
        ended = _wait(running, time.monotonic() + patience)
    finally:
        for process in running.values():
            if process.is_alive():
                process.kill()
            process.join()
    if ended.keys() < running.keys() or any(ended.values()):
        pytest.fail(_told(ended, files), pytrace=False)


def _wait(running: Mapping[str, BaseProcess], deadline: float) -> dict[str, int]:
    """Exit codes by name; those that outlive the deadline, or another's failure, are made to show where they are."""
    ended: dict[str, int] = {}
    waiting = dict(running)
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready = connection.wait([process.sentinel for process in waiting.values()], left)
        for name in [name for name, process in waiting.items() if process.sentinel in ready]:
            process = waiting.pop(name)
            process.join()
            ended[name] = process.exitcode or 0
            if ended[name]:
                deadline = min(deadline, time.monotonic() + _LAST_WORDS)
    for process in waiting.values():
        if process.pid and process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join(_LAST_WORDS)
    return ended


def _told(ended: Mapping[str, int], files: Mapping[str, Path]) -> str:
    """What each that did not end well said, in the order in which they stopped saying anything."""
    silent = {name: files[name].stat().st_mtime_ns for name, code in ended.items() if code}
    failed = sorted(silent, key=lambda name: silent[name])  # of equal dates, in the order in which they ended
    lines = []
    for name in [*failed, *(name for name in files if name not in ended)]:
        how = f"exit code {ended[name]}" if name in ended else "stopped by the test: it had not ended"
        lines.append(f"{name}: {how}\n{files[name].read_text(errors='replace').rstrip()}")
    return "\n\n".join(lines)


def _child(errors: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    faulthandler.enable()
    gc.freeze()  # what the forkserver had: to look through it for garbage costs a second each time
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # as in a process that was not forked
    target(*arguments)
