"""The slurm executor: task i of n does the jobs of a fixed list whose number mod n is i, in series, without Ray.

The list never changes. So tasks that start at different times agree on their work without communication. A task that
starts again skips committed jobs. If two tasks do the same job, it still gets only one commit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nfm.stages.base import Inputs, Reporter, StageError, Stopped, Unfit
from nfm.stages.executors import serial
from nfm.stages.executors.jobs import Halt, Job, Outcome, Work
from nfm.storage.errors import NewerSchema, StorageError
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path, exists
from nfm.storage.files.small_files import read_bytes
from nfm.storage.ledger import commits

SCHEMA = 1
EXPECTED = "give the file that `nfm worklist STAGE -c F -o FILE` wrote"
PAIRS = "pairs"  # whose lists do not say what stage they are of


class Pieces(Protocol):
    """What a stage whose work is in pieces does for the tasks of an array."""

    def pieces_left(self, config: Any, inputs: Inputs, out: Path, report: Reporter) -> list[str]:
        """The names of the pieces without a commit. What tasks need beside the list is in `out` then."""
        ...

    def make_pieces(
        self, config: Mapping[str, Any], inputs: Inputs, out: Path, mine: Sequence[str], left: Sequence[str],
        report: Reporter,
    ) -> list[Outcome]:  # fmt: skip
        """Makes the pieces `left` of those that are a task's. Returns the failures."""
        ...


@dataclass(frozen=True)
class Worklist:
    """An artifact, its stage, its inputs by role, the config of its section, and the names of its pending pieces.

    A piece's number is its position.
    """

    store: str
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, Any]
    shards: tuple[str, ...]
    stage: str = PAIRS


def freeze(found: Worklist, file: Path) -> Worklist:
    """Writes the list of what is pending, or keeps an existing list.

    Tasks may already use an existing list (after a planning job was requeued). It is kept if it is for the same
    artifact and has all pending pieces. Otherwise raises StageError.
    """
    if atomic.create_json(file, {"schema": SCHEMA, **vars(found), "shards": list(found.shards)}):
        return found
    there = load(file)
    other = (there.store, there.fingerprint) != (found.store, found.fingerprint)
    lacking = set(found.shards) - set(there.shards)
    if other or lacking:
        what = f"is the list of {there.store}" if other else f"lacks {len(lacking)} shards that are pending now"
        raise Unfit(f"{file}: exists and {what}; a list is never changed, choose another file for the new one")
    return there


def load(file: str | Path) -> Worklist:
    """Reads a list. Raises StorageError if it is damaged, StageError if its artifact is missing or another one.

    A file of another kind is wrong use.
    """
    try:
        body = atomic.read_json(file)
    except StorageError:
        if _is_of_another_kind(file):
            raise Unfit(f"{file}: no worklist; {EXPECTED}") from None
        raise
    if _lacks_all(body):
        raise Unfit(f"{file}: no worklist; {EXPECTED}")
    if body.get("schema", 0) > SCHEMA:
        raise NewerSchema(f"{file}: schema {body['schema']} is newer than this version of nfm reads; upgrade nfm-pairs")
    try:
        worklist = Worklist(
            store=str(body["store"]),
            fingerprint=str(body["fingerprint"]),
            inputs=dict(body["inputs"]),
            config=dict(body["config"]),
            shards=tuple(map(str, body["shards"])),
            stage=str(body.get("stage", PAIRS)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Unfit(f"{file}: no worklist ({error!r}); {EXPECTED}") from error
    spec = as_path(worklist.store) / "spec.json"
    if not exists(spec):
        raise StageError(f"{file}: its store {worklist.store} is not there; is its file system mounted on this node?")
    if atomic.read_json(spec)["fingerprint"] != worklist.fingerprint:
        raise StageError(f"{spec}: not the recipe that {file} was made for; make a new list with `nfm worklist`")
    return worklist


def _lacks_all(body: Any) -> bool:
    """Whether a JSON value has nothing that a list has."""
    return not isinstance(body, dict) or {"store", "shards"}.isdisjoint(body)


def _is_of_another_kind(file: str | Path) -> bool:
    """Whether a file that cannot be read as a list never was one: a damaged list is an object, or begins as one."""
    try:
        text = read_bytes(as_path(file))
    except OSError:
        return False
    try:
        return _lacks_all(json.loads(text))
    except (ValueError, RecursionError):  # damaged lists are no JSON either
        return not (text.startswith(b"{") and b'"' in text)


def make_share(worklist: Worklist, stage: Pieces, task: int, of: int, report: Reporter) -> dict[str, int]:
    """Makes the pieces of task `task` of `of`. Returns how many pieces it had and how many it committed.

    Raises Stopped if the user asked to stop and pieces are left. Raises StageError if pieces failed three times; they
    are listed in `failed/`, and the others are committed.
    """
    if not 0 <= task < of:
        raise Unfit(f"--task {task} --of {of}: tasks count from 0 to {of - 1}")
    out, mine = as_path(worklist.store), share(worklist.shards, task, of)
    # What only the making of other stages' artifacts needs, commits too, is not kept in finished ones.
    left = [] if exists(out / "manifest.json") else open_names(out, mine)
    report.say(f"{len(mine)} shards are this task's, {len(mine) - len(left)} of them committed already")
    if not left:
        return {"shards": len(mine), "committed": 0}
    inputs = {role: Path(mirror.here(path)) for role, path in worklist.inputs.items()}
    failed = {failure.job.name for failure in stage.make_pieces(worklist.config, inputs, out, mine, left, report)}
    missing = open_names(out, left)
    if report.ending and set(missing) - failed:
        raise Stopped
    if missing:
        raise StageError(
            f"{len(missing)} of this task's {len(mine)} shards are missing: {', '.join(missing[:5])}; the tracebacks "
            f"are in {out / 'failed'}. The others are committed; the same command tries only these again"
        )
    return {"shards": len(mine), "committed": len(left)}


def share(names: Sequence[str], task: int, of: int) -> list[str]:
    """The names for task `task` of `of`. Each name belongs to exactly one task."""
    return list(names[task::of])


def open_names(store: str | Path, names: Iterable[str]) -> list[str]:
    """The names that have no commit yet. Commits of all stages have the same places."""
    root = as_path(store)
    return [name for name in names if not exists(commits.commit_path(root, name))]


def run(work: Work, jobs: Iterable[Job], workers: int, halt: Halt) -> Iterator[Outcome | None]:
    """Does the jobs of one task in this process, in order. Skips those that others have committed meanwhile."""
    return serial.run(work, _still_open(work.store, jobs, halt), workers, halt)


def _still_open(store: str, jobs: Iterable[Job], halt: Halt) -> Iterator[Job]:
    for job in jobs:
        if halt.ending:
            return
        if open_names(store, [job.name]):
            yield job
