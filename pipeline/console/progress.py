"""How far work is that goes on now, perhaps in many processes, as its folder tells."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.stages.display import units
from nfm.stages.pairs import progress
from nfm.storage.errors import StorageError
from nfm.storage.files.small_files import read_tail

FRESH_SECONDS = 90.0  # they tell every 30: a process that told nothing for so long is dead, or waits
TAIL_BYTES = 1 << 18


def figures(artifact: Artifact, draws: int | None = None) -> str:
    """How far the work on an unfinished artifact is; of a pair store with `draws` draws, by its commits.

    Processes that write to one store each have their own events: shards and pairs are counted where they are
    committed, so that nothing is counted twice, and the rates of those at work are added up.
    """
    events = artifact.path / "events"
    running = [event for event in _newest(events) if time.time() - event["time"] <= FRESH_SECONDS]
    rate = sum(event.get("per_second", 0.0) for event in running)
    if draws is None or "store" not in artifact.spec:
        left = max((event.get("seconds_left") or 0.0 for event in running), default=0.0)
        speed = f", {units.rate(rate, running[0]['unit'])}, {units.clock(left)} left" if rate and left else ""
        return last_progress(events) + speed
    count = progress.committed(artifact.path, draws)
    words = [f"{count[some]:,} of {count[f'all_{some}']:,} {some}" for some in ("pairs", "shards")]
    words += [f"{count['failed']:,} failed"] if count["failed"] else []
    if rate:
        left = (count["all_pairs"] - count["pairs"]) / rate
        words += [units.rate(rate, "pairs"), f"{units.clock(left)} left"]
    return ", ".join(words)


def last_progress(events: Path) -> str:
    """How far the work in a folder came, by the last PROGRESS line of its newest events."""
    for path in sorted(events.glob("*.jsonl"), reverse=True):
        for event in _backwards(path):
            if event["kind"] == "PROGRESS":
                return f"{event['done']:,} of {event['total']:,} {event['unit']}"
    return ""


def _newest(events: Path) -> Iterator[dict[str, Any]]:
    """The last PROGRESS of every process that has not ended."""
    for path in sorted(events.glob("*.jsonl")):
        for event in _backwards(path):
            if event["kind"] in ("COMPLETE", "STOP", "FAIL"):
                break
            if event["kind"] == "PROGRESS":
                yield event
                break


def _backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a process, newest first, as far as the end of its file holds them; half a line is passed over."""
    try:
        lines = read_tail(path, TAIL_BYTES, root=path.parent.parent).splitlines()
    except (StorageError, OSError):
        return  # no log: progress is told without it
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event and isinstance(event.get("time"), int | float):
            yield event
