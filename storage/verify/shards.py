"""Checks every shard of a store against its commit and its manifests, in parallel; only some are in memory
at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from nfm.storage import layouts
from nfm.storage.errors import StorageError
from nfm.storage.files import folder as listing
from nfm.storage.files.atomic import content_digest
from nfm.storage.files.parallel import parallel
from nfm.storage.format.commit import ShardFiles
from nfm.storage.ledger import commits
from nfm.storage.ledger.commits import Commit
from nfm.storage.ledger.shard_list import Entry
from nfm.storage.ledger.standing import MEND
from nfm.storage.ledger.sums import Sums
from nfm.storage.verify.content import content_problems
from nfm.storage.verify.files import Finding, Level, check_file, finding_of, local_copies
from nfm.storage.verify.survey import Listed, Survey, read_commit

REMAKE = "its bytes are as committed: what encoded it was at fault, move the store away and make it again"
COPY = "restore it from a copy"
_TOGETHER = 256  # shards that a thread takes at a time, if the check of each is quick
Item = TypeVar("Item")


@dataclass
class Checked:
    """The result of checking all shards."""

    findings: list[Finding] = field(default_factory=list)
    files: set[str] = field(default_factory=set)  # named by commits but by no manifest
    sums: dict[int, Sums] = field(default_factory=dict)  # of the readable commits that each generation lists


def check_shards(found: Survey, wanted: Collection[int], unlisted: bool, level: Level) -> Checked:
    """Findings about the shards that generations `wanted` list, and with `unlisted` about all other commits."""
    checked = Checked()
    with listing.Folder(found.root, "commits") as folder:

        def look(shards: list[Listed]) -> list[tuple[Listed, Commit | None, bool, list[Finding]]]:
            return [_look(found, folder, shard, wanted, unlisted, level) for shard in shards]

        chunks = _chunks(found.shards(), _TOGETHER if level == "quick" else 1)
        for chunk in parallel(look, chunks):
            for shard, commit, known, findings in chunk:
                checked.findings += findings
                if commit is None:
                    continue
                if not known:
                    checked.files |= found.all_files(commit)
                for number, _ in shard.entries:
                    if number not in checked.sums:
                        checked.sums[number] = Sums(found.spec)
                    checked.sums[number].add(commit)
    return checked


def _look(
    found: Survey, folder: listing.Folder, shard: Listed, wanted: Collection[int], unlisted: bool, level: Level
) -> tuple[Listed, Commit | None, bool, list[Finding]]:
    """(the shard, its commit, whether a manifest names that commit's files, what is wrong)."""
    every = [entry for _, entry in shard.entries]
    commit: Commit | StorageError | None = None
    sha256 = ""
    if shard.committed:
        commit, sha256 = read_commit(found.root, folder, shard.name, every, trusting=level == "quick")
    own = Entry.of(commit, sha256) if isinstance(commit, Commit) else None
    known = any(entry == own for entry in every)
    findings: list[Finding] = []
    entries = [entry for number, entry in shard.entries if number in wanted]
    if (entries or unlisted) and not (level == "quick" and own is not None and _is_clean(found, own, entries)):
        findings = list(_findings(found, shard.name, commit, sha256, entries, level))
    return shard, commit if isinstance(commit, Commit) else None, known, findings


def _is_clean(found: Survey, own: Entry, entries: Sequence[Entry]) -> bool:
    """A quick check that a shard is as it was committed and sealed: plain files of the stated sizes."""
    return (
        not layouts.of(found.spec).by_field
        and not own.parts
        and all(found.sizes.get(file.path) == file.bytes for file in (own.payload, own.index))
        and all(entry == own for entry in entries)
    )


def _findings(
    found: Survey,
    name: str,
    commit: Commit | StorageError | None,
    sha256: str,
    entries: Sequence[Entry],
    level: Level,
) -> Iterator[Finding]:
    root, path = found.root, commits.commit_path(found.root, name)
    if commit is None:
        yield Finding("quick", str(path), "the commit is missing", MEND)
    elif isinstance(commit, StorageError):
        yield finding_of("quick", path, commit, COPY)
    elif not _is_sealed(commit, sha256, entries):
        yield Finding("quick", str(path), "is not the commit that was sealed", MEND)
    sources: list[ShardFiles] = [*entries] or ([commit] if isinstance(commit, Commit) else [])
    files = dict.fromkeys(file for source in sources for file in found.present(source))
    if sources and not files:
        yield Finding("quick", str(path), f"its files are not those of layout {found.spec.layout}", MEND)
        return
    damaged = [finding for file in files if (finding := check_file(root, file, level, MEND))]
    yield from damaged
    if level == "quick" or damaged or not isinstance(commit, Commit):
        return
    payload = root / commit.payload.path
    try:
        with local_copies(root, found.present(commit)) as (*copies, index):
            for problem in content_problems(found.spec, commit, copies, index, deep=level == "deep"):
                yield Finding("default", str(payload), problem, REMAKE)
    except StorageError as error:
        yield finding_of("default", payload, error, REMAKE)


def _is_sealed(commit: Commit, sha256: str, entries: Sequence[Entry]) -> bool:
    """Whether a commit agrees with itself and with its entries in all these manifests; there may be none yet."""
    if commit.parts and commit.payload.sha256 != content_digest(part.sha256 for part in commit.parts):
        return False
    return all(entry == Entry.of(commit, sha256) for entry in entries)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk
