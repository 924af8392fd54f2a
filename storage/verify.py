"""Does a store hold what its manifests say? Reads only; names every file that is wrong, and the remedy."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nfm.storage import commits, generations, layout
from nfm.storage.atomic import content_digest, hash_file
from nfm.storage.commits import Commit
from nfm.storage.errors import StorageError
from nfm.storage.layout import Entry
from nfm.storage.moments import pool
from nfm.storage.order import order_key
from nfm.storage.paths import as_path, read_bytes, size_of
from nfm.storage.schema import SPEC, StoreSpec
from nfm.storage.verify_content import close, content_problems
from nfm.storage.verify_fields import check_fields
from nfm.storage.verify_files import (
    LEVELS,
    Finding,
    Level,
    check_file,
    finding_of,
    leads_outside,
    local_copies,
    surplus,
)
from nfm.storage.verify_stock import check_stock_reader
from nfm.storage.verify_survey import Survey, load, survey

__all__ = ["LEVELS", "Finding", "Level", "orphans", "verify"]
_AGAIN = "restore it from a copy, or run `nfm repair` on the store and then the pairs stage again"
_REMAKE = "its bytes are as committed: what encoded it was at fault, move the store away and make it again"
_RESEAL = "restore it from a copy, or set it aside and run `nfm pairs seal` on the store"
_UNSEALED = "restore it, or run the pairs stage to its end, which seals the store"
_COPY = "restore it from a copy"


def verify(store_root: str | Path, generation: int | None = None, level: Level = "quick") -> list[Finding]:
    """All that is wrong with a store, or with one generation of it; an empty list says it is whole.

    `quick`: files exist with their sizes, commits and manifests match their digests and each other, and there is
    no file that belongs to nothing. `default` also hashes every file and reads the shards: every slot once, keys and
    labels equal in shard and index, noise finite, moments as committed. `deep` reads every record through the stock
    readers, too. Shards are checked in parallel; nothing is changed. Files of attempts that were killed are no
    findings, see `orphans`. Raises StorageError when a stock reader is not installed, nothing else.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: use one of {', '.join(LEVELS)}")
    root = as_path(store_root)
    try:
        found = survey(root)
    except StorageError as error:
        return [finding_of("quick", root / SPEC, error, f"{_COPY}, it is the store's recipe")]
    if level == "deep":
        check_stock_reader(found.spec)
    wanted = [generation] if generation is not None else list(found.manifests) or [1]
    listed: dict[str, list[Entry]] = {name: [] for name in found.commits} if generation is None else {}
    for entry in found.entries(wanted):
        listed.setdefault(entry["name"], []).append(entry)

    def check(name: str) -> list[Finding]:
        return list(_shard_findings(found, name, listed[name], level))

    findings = [finding for number in wanted for finding in _manifest_findings(found, number)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as threads:
        for more in threads.map(check, sorted(listed)):
            findings += more
    findings += _metadata_findings(found, found.draws(wanted))
    named, more = check_fields(root, level)
    return findings + more + surplus(root, found.spec, named | found.named())[0]


def orphans(store_root: str | Path) -> list[str]:
    """Files that attempts left when they were killed, relative to the store: of no harm, and of no use."""
    found = survey(as_path(store_root))
    return surplus(found.root, found.spec, check_fields(found.root, "quick")[0] | found.named())[1]


def _manifest_findings(found: Survey, number: int) -> Iterator[Finding]:
    spec, path = found.spec, generations.manifest_path(found.root, number)
    manifest = found.manifests.get(number) or load(found.root, number)
    if isinstance(manifest, StorageError):
        yield finding_of("quick", path, manifest, _UNSEALED)
        return
    shards, problems = manifest["shards"], []
    expected = generations.names_of(spec, manifest["draws"])
    listed = [entry["name"] for entry in shards]
    if manifest["generation"] != number:
        problems.append(f"is the manifest of generation {manifest['generation']}")
    if listed != expected:
        odd = sorted(set(listed) ^ set(expected)) or ["their order"]
        problems.append(f"does not list each shard once: {', '.join(odd[:8])}")
    files = Counter(file.path for entry in shards for file in found.files(entry))
    if twice := [file for file, times in files.items() if times > 1]:
        problems.append(f"lists a file twice: {', '.join(twice[:8])}")
    if manifest["content_digest"] != content_digest(entry["sha256"] for entry in shards):
        problems.append("its content digest is not that of its shards")
    if manifest["records"] != spec.rows * manifest["draws"]:
        problems.append(f"{manifest['records']} records, not {spec.rows} x {manifest['draws']}")
    if manifest["order_key"] != order_key(spec.source, spec.rows, manifest["draws"]):
        problems.append("its order key is not that of the spec")
    parts = [commit for name in listed if isinstance(commit := found.commits.get(name), Commit)]
    if len(parts) == len(expected) and not _are_pooled(spec, parts, manifest.get("moments")):
        problems.append("its moments are not those of its commits")
    if len(parts) == len(expected) and manifest.get("clipped", 0) != sum(part.clipped for part in parts):
        problems.append("its clipped values are not those of its commits")
    yield from (Finding("quick", str(path), problem, _RESEAL) for problem in problems)


def _are_pooled(spec: StoreSpec, parts: Sequence[Commit], stated: Any) -> bool:
    values = math.prod(spec.field("noise").shape)
    pooled = pool((part.records * values, part.moments) for part in parts)
    return isinstance(stated, Mapping) and all(close(value, stated.get(name)) for name, value in pooled.items())


def _metadata_findings(found: Survey, draws: int) -> Iterator[Finding]:
    """What stock readers are told of a store is a function of its recipe, so every byte of it is known."""
    for name, data in layout.metadata(found.spec, draws).items():
        path = found.root / name
        if size_of(path) is None:
            yield Finding("quick", str(path), "the file is missing", _RESEAL)
        elif leads_outside(found.root, path) or read_bytes(path) != data:
            yield Finding("quick", str(path), "is not what the store's recipe gives", _RESEAL)


def _shard_findings(found: Survey, name: str, entries: Sequence[Entry], level: Level) -> Iterator[Finding]:
    root, commit, path = found.root, found.commits.get(name), commits.commit_path(found.root, name)
    if commit is None:
        yield Finding("quick", str(path), "the commit is missing", _AGAIN)
    elif isinstance(commit, StorageError):
        yield finding_of("quick", path, commit, _COPY)
    elif not _is_sealed(found, commit, path, entries):
        yield Finding("quick", str(path), "is not the commit that was sealed", _AGAIN)
    sources: list[Any] = [*entries] or ([commit] if isinstance(commit, Commit) else [])
    files = dict.fromkeys(file for source in sources for file in found.present(source))
    if sources and not files:
        yield Finding("quick", str(path), f"its files are not those of layout {found.spec.layout}", _AGAIN)
        return
    damaged = [finding for file in files if (finding := check_file(root, file, level, _AGAIN))]
    yield from damaged
    if level == "quick" or damaged or not isinstance(commit, Commit):
        return
    payload = root / commit.payload
    try:
        with local_copies(root, found.present(commit)) as (*copies, index):
            for problem in content_problems(found.spec, commit, copies, index, deep=level == "deep"):
                yield Finding("default", str(payload), problem, _REMAKE)
    except StorageError as error:
        yield finding_of("default", payload, error, _REMAKE)


def _is_sealed(found: Survey, commit: Commit, path: Path, entries: Sequence[Entry]) -> bool:
    """Whether a commit is the one that all these manifests list; one that none lists yet only agrees with itself."""
    if commit.parts and commit.payload_sha256 != content_digest(part["sha256"] for part in commit.parts):
        return False
    sha256 = hash_file(path)[0]
    own = (found.files(commit), commit.payload_sha256, commit.payload_bytes, commit.records)
    return all(
        entry["commit_sha256"] == sha256
        and own == (found.files(entry), entry["sha256"], entry["bytes"], entry["records"])
        for entry in entries
    )
