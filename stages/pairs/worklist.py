"""A worklist: the missing shards of a store, numbered and fixed for the tasks of an array, with all that these need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.stages.base import Inputs, Reporter, StageError, Stopped, Unfit
from nfm.stages.executors import slurm
from nfm.stages.pairs import production as making
from nfm.stages.pairs import stage
from nfm.stages.pairs.config import PairsConfig
from nfm.storage.errors import NewerSchema, StorageError
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path, exists
from nfm.storage.format.spec import read_spec

SCHEMA = 1


@dataclass(frozen=True)
class Worklist:
    """A store, its inputs by role, how to encode, and the names of its pending shards.

    A shard's number is its position.
    """

    store: str
    fingerprint: str
    inputs: dict[str, str]
    config: dict[str, Any]
    draws: int
    shards: tuple[str, ...]


def freeze(config: PairsConfig, inputs: Inputs, out: Path, file: Path) -> Worklist:
    """Writes the list of pending shards in the store `out`, or keeps an existing list.

    Tasks may already use an existing list (after a planning job was requeued). It is kept if it is for the same store
    and has all pending shards. Otherwise raises StageError.
    """
    worklist = Worklist(
        store=mirror.origin(out),
        fingerprint=atomic.read_json(out / "spec.json")["fingerprint"],
        inputs={role: mirror.origin(path) for role, path in inputs.items()},
        config=config.model_dump(mode="json"),
        draws=config.draws,
        shards=tuple(making.pending(out, read_spec(out), config.draws)),
    )
    body = {**vars(worklist), "shards": list(worklist.shards)}
    if atomic.create_json(file, {"schema": SCHEMA, **body}):
        return worklist
    found = load(file)
    other = (found.store, found.fingerprint) != (worklist.store, worklist.fingerprint)
    lacking = set(worklist.shards) - set(found.shards)
    if other or lacking:
        what = f"is the list of {found.store}" if other else f"lacks {len(lacking)} shards that are pending now"
        raise Unfit(f"{file}: exists and {what}; a list is never changed, choose another file for the new one")
    return found


def load(file: str | Path) -> Worklist:
    """Reads a list. Raises StorageError if it is damaged, StageError if its store is missing or another one."""
    body = atomic.read_json(file)
    if body.get("schema", 0) > SCHEMA:
        raise NewerSchema(f"{file}: schema {body['schema']} is newer than this version of nfm reads; upgrade nfm-pairs")
    try:
        worklist = Worklist(
            store=str(body["store"]),
            fingerprint=str(body["fingerprint"]),
            inputs=dict(body["inputs"]),
            config=dict(body["config"]),
            draws=int(body["draws"]),
            shards=tuple(map(str, body["shards"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{file}: no worklist ({error!r}); make one with `nfm pairs worklist`") from error
    spec = as_path(worklist.store) / "spec.json"
    if not exists(spec):
        raise StageError(f"{file}: its store {worklist.store} is not there; is its file system mounted on this node?")
    if atomic.read_json(spec)["fingerprint"] != worklist.fingerprint:
        raise StageError(f"{spec}: not the recipe that {file} was made for; make a new list with `nfm pairs worklist`")
    return worklist


def encode(worklist: Worklist, task: int, of: int, report: Reporter) -> dict[str, int]:
    """Encodes the shards of task `task` of `of`. Returns how many shards it had and how many it committed.

    Raises Stopped if the user asked to stop and shards are left. Raises StageError if shards failed three times; they
    are listed in `failed/`, and the others are committed.
    """
    if not 0 <= task < of:
        raise Unfit(f"--task {task} --of {of}: tasks count from 0 to {of - 1}")
    out, config = as_path(worklist.store), PairsConfig(**worklist.config)
    spec, mine = read_spec(out), slurm.share(worklist.shards, task, of)
    left = slurm.open_names(out, mine)
    report.say(f"{len(mine)} shards are this task's, {len(mine) - len(left)} of them committed already")
    if not left:
        return {"shards": len(mine), "committed": 0}
    setting = stage.setup(config, {role: Path(mirror.here(path)) for role, path in worklist.inputs.items()}, out)
    stage.announce(spec, setting, report)
    outcomes = slurm.run(setting, making.jobs(left), 1, report)
    total = making.records_of(spec, mine)
    done = total - making.records_of(spec, left)
    failed = {failure.job.name for failure in making.produce(out, outcomes, setting.batch_size, report, done, total)}
    missing = slurm.open_names(out, left)
    if report.ending and set(missing) - failed:
        raise Stopped
    if missing:
        raise StageError(
            f"{len(missing)} of this task's {len(mine)} shards are missing: {', '.join(missing[:5])}; the tracebacks "
            f"are in {out / 'failed'}. The others are committed; the same command tries only these again"
        )
    return {"shards": len(mine), "committed": len(left)}
