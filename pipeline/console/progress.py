"""The progress of running work, perhaps in many processes, read from its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nfm.pipeline.artifacts.artifact import Artifact
from nfm.stages.display import units
from nfm.stages.pairs import progress
from nfm.stages.trained.training.checkpoints import newest_checkpoint
from nfm.storage.errors import StorageError
from nfm.storage.files.paths import names_in
from nfm.storage.files.small_files import read_tail

FRESH_SECONDS = 90.0  # processes report every 30 s; one that is silent for so long is dead or waits
TAIL_BYTES = 1 << 18


def figures(artifact: Artifact, draws: int | None = None) -> str:
    """The progress of an unfinished artifact; for a pair store with `draws` draws, from its commits.

    Each process that writes to a store has its own events. Shards and pairs are counted by commits, so that none is
    counted twice; the rates of running processes are added.
    """
    events = artifact.path / "events"
    alone = draws is None or "store" not in artifact.spec  # then only the newest process can be at work
    running = [event for event in _newest(events, alone) if time.time() - event["time"] <= FRESH_SECONDS]
    rate = sum(event.get("per_second", 0.0) for event in running)
    if draws is None or alone:
        left = max((event.get("seconds_left") or 0.0 for event in running), default=0.0)
        speed = f", {units.rate(rate, running[0]['unit'])}, {units.clock(left)} left" if rate and left else ""
        return last_progress(events) + speed if speed else _at_rest(artifact.path)
    count = progress.committed(artifact.path, draws)
    words = [f"{count[some]:,} of {count[f'all_{some}']:,} {some}" for some in ("pairs", "shards")]
    words += [f"{count['failed']:,} failed"] if count["failed"] else []
    if rate:
        left = (count["all_pairs"] - count["pairs"]) / rate
        words += [units.rate(rate, "pairs"), f"{units.clock(left)} left"]
    return ", ".join(words)


def _at_rest(folder: Path) -> str:
    """The progress of work that nobody is doing now.

    A training goes on from its newest checkpoint. The last line of its log may be later than that, or earlier.
    """
    event, saved = _last(folder / "events"), newest_checkpoint(folder)
    if event is None or not saved:
        return _told(event) or (f"the next run goes on from {saved:,}" if saved else "")
    done = max(event["done"], saved)
    return f"{_told({**event, 'done': done})}; the next run goes on from {'there' if done == saved else f'{saved:,}'}"


def last_progress(events: Path) -> str:
    """The progress of the work in a folder, from the last PROGRESS line of its newest events."""
    return _told(_last(events))


def _told(event: dict[str, Any] | None) -> str:
    return "" if event is None else f"{event['done']:,} of {event['total']:,} {event['unit']}"


def _last(events: Path) -> dict[str, Any] | None:
    found = (event for path in reversed(_logs(events)) for event in _backwards(path) if event["kind"] == "PROGRESS")
    return next(found, None)


def _newest(events: Path, alone: bool) -> Iterator[dict[str, Any]]:
    """The last PROGRESS of every process that has not ended, or of the newest alone."""
    for path in _logs(events)[-1 if alone else 0 :]:
        for event in _backwards(path):
            if event["kind"] in ("COMPLETE", "STOP", "FAIL"):
                break
            if event["kind"] == "PROGRESS":
                yield event
                break


def _logs(events: Path) -> list[Path]:
    return [events / name for name in names_in(events) if name.endswith(".jsonl")]


def _backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a process, newest first, as far as the end of its file has them. An incomplete line is skipped."""
    try:
        lines = read_tail(path, TAIL_BYTES, root=path.parent.parent).splitlines()
    except (StorageError, OSError):
        return  # no log: progress is shown without it
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event and isinstance(event.get("time"), int | float):
            yield event
