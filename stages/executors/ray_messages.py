"""What Ray itself writes to the terminal, made short: one line a message on standard error, and where its logs are."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# What an executor says in its own words, with the worker's name and what becomes of its work.
_OURS = ("A worker died or was killed while executing a task",)
# Said at every start, and nothing to act on.
_USUAL = ("Token authentication is enabled",)
_SENTENCE = re.compile(r"(?<=[.:])\s+(?=[A-Z(])")


def logs() -> str:
    """The folder in which Ray on this machine keeps the output of its processes."""
    from ray._private import worker

    node = worker._global_node
    if node is not None:
        return str(node.get_logs_dir_path())
    return os.path.join(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray", "session_latest", "logs")


@contextmanager
def shortened() -> Iterator[None]:
    """Shows what Ray's processes report in one line each, once, and Ray's own log lines behind `Ray: `.

    Ray would write whole paragraphs to standard output, in which our own lines are lost.
    """
    from ray._private import worker as module

    worker: Any = module
    terminal: Any = logging.lastResort  # writes what nobody has asked for; Ray is told to set up no logging
    before, formatter = worker.print_to_stdstream, terminal.formatter
    worker.print_to_stdstream = _Reports()
    terminal.setFormatter(_Lines())
    terminal.addFilter(_unusual)
    try:
        yield
    finally:
        worker.print_to_stdstream = before
        terminal.setFormatter(formatter)
        terminal.removeFilter(_unusual)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = super().format(record)
        return f"Ray: {told}" if record.name.partition(".")[0] == "ray" else told


def _unusual(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_USUAL)


class _Reports:
    """Takes the place of Ray's function that prints what its processes report."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        text = " ".join(" ".join(map(str, data["lines"])).split())
        line = f"Ray: {short(text)}; its logs are in {logs()}"
        kind = re.sub("[0-9a-f]*[0-9][0-9a-f]*", "", line)  # the same with another worker or percentage
        if text.startswith(_OURS) or kind in self._told:
            return
        self._told.add(kind)
        print(line, file=sys.stderr, flush=True)


def short(text: str) -> str:
    """The first sentence of a message of Ray, without colours and its end."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    return _SENTENCE.split(plain, maxsplit=1)[0].rstrip(".: ")
