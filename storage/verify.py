"""Does a store hold what its manifest says? Reads only; names every file that is wrong, and the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nfm.storage import commits, generations
from nfm.storage.atomic import content_digest, hash_file
from nfm.storage.commits import Commit
from nfm.storage.errors import StorageError
from nfm.storage.index import keys_digest, read_index, record_keys
from nfm.storage.moments import MomentSums
from nfm.storage.order import order_key
from nfm.storage.schema import SPEC, StoreSpec, read_spec
from nfm.storage.tar import MappedShard

Level = Literal["quick", "default"]
_AGAIN = "restore it from a copy, or run `nfm repair` on the store and then the pairs stage again"
_REMAKE = "its bytes are as committed: what encoded it was at fault, move the store away and make it again"
_RESEAL = "restore it from a copy, or set it aside and run `nfm pairs seal` on the store"


@dataclass(frozen=True)
class Finding:
    """One thing wrong: the level of the check that saw it, the file, the problem and the remedy."""

    level: Level
    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}; {self.remedy}"


def verify(store_root: str | Path, generation: int | None = None, level: Level = "quick") -> list[Finding]:
    """All that is wrong with a generation (default: the newest); an empty list says it is whole.

    `quick`: files exist with their sizes, commits and manifest match their digests and each other. `default`
    also hashes every shard and index part, and reads them: every slot once, keys and labels equal in shard
    and index, noise finite, moments as committed. Shards are checked in parallel; nothing is changed.
    """
    if level not in ("quick", "default"):
        raise ValueError(f"level {level!r}: use 'quick' or 'default'")
    root = Path(store_root)
    try:
        spec = read_spec(root)
    except StorageError as error:
        return [_found("quick", root / SPEC, error, "restore it from a copy, it is the store's recipe")]
    try:
        number = generation if generation is not None else max(generations.numbers(root), default=1)
        manifest = generations.load(root, number)
    except StorageError as error:
        path = generations.manifest_path(root, number)
        return [_found("quick", path, error, "run the pairs stage to its end, which seals the store")]
    findings = list(_manifest_findings(root, spec, manifest))

    def check(entry: dict[str, Any]) -> list[Finding]:
        return list(_shard_findings(root, spec, entry, level))

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for found in pool.map(check, manifest["shards"]):
            findings.extend(found)
    return findings


def _manifest_findings(root: Path, spec: StoreSpec, manifest: dict[str, Any]) -> Iterator[Finding]:
    path, shards = str(generations.manifest_path(root, manifest["generation"])), manifest["shards"]
    expected = generations.names_of(spec, manifest["draws"])
    listed = [entry["name"] for entry in shards]
    if listed != expected:
        odd = sorted(set(listed) ^ set(expected)) or ["their order"]
        yield Finding("quick", path, f"does not list each shard once: {', '.join(odd[:8])}", _RESEAL)
    if manifest["content_digest"] != content_digest(entry["sha256"] for entry in shards):
        yield Finding("quick", path, "its content digest is not that of its shards", _RESEAL)
    if manifest["records"] != spec.rows * manifest["draws"]:
        yield Finding("quick", path, f"{manifest['records']} records, not {spec.rows} x {manifest['draws']}", _RESEAL)
    if manifest["order_key"] != order_key(spec.source, spec.rows, manifest["draws"]):
        yield Finding("quick", path, "its order key is not that of the spec", _RESEAL)


def _shard_findings(root: Path, spec: StoreSpec, entry: dict[str, Any], level: Level) -> Iterator[Finding]:
    commit_file = commits.commit_path(root, entry["name"])
    again = _AGAIN
    try:
        commit = commits.read(root, entry["name"])
        if commit is None:
            yield Finding("quick", str(commit_file), "the commit is missing", again)
        elif hash_file(commit_file)[0] != entry["commit_sha256"] or not _agrees(commit, entry):
            yield Finding("quick", str(commit_file), "is not the commit that was sealed", again)
    except StorageError as error:
        yield _found("quick", commit_file, error, "restore it from a copy")
        commit = None
    whole = True
    for name, sha256, size in (
        (entry["payload"], entry["sha256"], entry["bytes"]),
        (entry["index"], entry["index_sha256"], entry["index_bytes"]),
    ):
        finding = _file_finding(root / name, sha256, size, level, again)
        if finding is not None:
            whole = False
            yield finding
    if level == "default" and whole and commit is not None:
        yield from _content_findings(root, spec, commit, _REMAKE)


def _agrees(commit: Commit, entry: dict[str, Any]) -> bool:
    own = {
        "payload": commit.payload,
        "sha256": commit.payload_sha256,
        "bytes": commit.payload_bytes,
        "index": commit.index,
        "index_sha256": commit.index_sha256,
        "index_bytes": commit.index_bytes,
        "records": commit.records,
    }
    return own.items() <= entry.items()


def _file_finding(path: Path, sha256: str, size: int, level: Level, remedy: str) -> Finding | None:
    if not path.is_file():
        return Finding("quick", str(path), "the file is missing", remedy)
    found = path.stat().st_size
    if found != size:
        return Finding("quick", str(path), f"{found} bytes, {size} were committed: truncated or altered", remedy)
    if level == "default":
        try:
            actual = hash_file(path)[0]
        except StorageError as error:
            return _found("default", path, error, remedy)
        if actual != sha256:
            return Finding("default", str(path), f"SHA-256 {actual[:12]}, {sha256[:12]} was committed", remedy)
    return None


def _content_findings(root: Path, spec: StoreSpec, commit: Commit, remedy: str) -> Iterator[Finding]:
    path, slots = root / commit.payload, spec.slots_of(commit.shard)
    try:
        shard = MappedShard(path, spec.fields, len(slots), spec.rows_per_block)
        index = read_index(root / commit.index)
    except StorageError as error:
        yield _found("default", path, error, remedy)
        return
    problems = []
    own, stored = np.arange(slots.start, slots.stop), shard.read("slot", 0, len(slots))
    if not np.array_equal(stored, own):
        problems.append("its slots are not each there once, in order")
    if keys_digest(commit.draw, stored.tolist()) != commit.keys_digest:
        problems.append("the digest of its keys is not the committed one")
    if index["key"].to_pylist() != record_keys(commit.draw, slots) or not np.array_equal(index["slot"], own):
        problems.append("the keys of its index part are not its own")
    if spec.has("label") and not np.array_equal(shard.read("label", 0, len(slots)), index["label"]):
        problems.append("the labels of its index part are not its own")
    problems += _moment_problems(spec, shard, commit)
    for problem in problems:
        yield Finding("default", str(path), problem, remedy)


def _moment_problems(spec: StoreSpec, shard: MappedShard, commit: Commit) -> list[str]:
    sums = MomentSums()
    for start in range(0, len(shard), spec.rows_per_block):
        sums.add(shard.read("noise", start, min(start + spec.rows_per_block, len(shard))))
    if sums.nonfinite:
        return [f"{sums.nonfinite} values of the noise are not finite"]
    return [
        f"{name} of the noise is {value}, {commit.moments.get(name)} was committed"
        for name, value in sums.result().items()
        if not _close(value, commit.moments.get(name))
    ]


def _close(value: float | None, stated: float | None) -> bool:
    # Sums depend on how the values were batched, by rounding only.
    if value is None or stated is None:
        return value is stated
    return math.isclose(value, stated, rel_tol=1e-6, abs_tol=1e-7)


def _found(level: Level, path: Path, error: StorageError, remedy: str) -> Finding:
    cause = str(error).split("; ")[0].removeprefix(f"{path}: ")
    return Finding(level, str(path), cause, remedy)
