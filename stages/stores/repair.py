"""Maintenance of a pair store: what is complete, what is bad, and which files a shard has."""

from __future__ import annotations

from pathlib import Path
from re import fullmatch
from typing import Literal

from nfm.stages.base import Finding, StageError
from nfm.stages.display.units import megabytes, number_of, size
from nfm.storage import layouts
from nfm.storage import verify as storage_verify
from nfm.storage.errors import NewerSchema, StorageError
from nfm.storage.files import atomic
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import as_path, inside, names_in, size_of
from nfm.storage.format.spec import StoreSpec, read_spec, shard_name
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.row_fields import RowField, row_field_names
from nfm.storage.ledger.standing import again

Level = Literal["quick", "default", "deep"]
_READ = {
    "quick": "their sizes and the digests of commits and manifests were checked, no shard was read",
    "default": "every byte was read",
    "deep": "every byte was read, and every record as stock readers do",
}


def pinned(store: str | Path) -> tuple[Path, int]:
    """(folder, generation) of a store, given as its folder or URL (newest generation) or as a manifest."""
    root, number = seal.pinned(store)
    return root, number or seal.newest_number(root) or 1


def verify(store: str | Path, level: Level) -> list[Finding]:
    """What is wrong with a store itself, or with the one generation whose manifest `store` is."""
    root, generation = pinned(store)
    whole = root == as_path(store)
    found = storage_verify.verify(root, None if whole else generation, level)
    return [Finding(finding.file, finding.problem, finding.remedy) for finding in found]


def looked_at(store: str | Path, level: Level) -> str:
    """What `verify` of this level read of a store without findings, in words."""
    root, spec = seal.pinned(store)[0], read_spec(seal.pinned(store)[0])
    numbers = seal.numbers(root) if root == as_path(store) else [pinned(store)[1]]
    entries = {entry.name: entry for number in numbers for entry in seal.load(root, number, spec).shards}
    files = [file for entry in entries.values() for file in (*layouts.files(spec, entry), entry.index)]
    fields = [RowField.open(root, name) for name in row_field_names(root)]
    files += [file for field in fields for file in field.files]
    records = sum(entry.records for entry in entries.values())
    held = f"{number_of(len(entries), 'shard')} of {number_of(records, 'pair')}"
    if fields:
        held += f", {number_of(len(fields), 'field')}"
    extent = f"{number_of(len(files), 'file')}, {size(sum(file.bytes for file in files))}"
    return f"{held}, {extent}; {_READ[level]}"


def unfinished(store: str | Path) -> str:
    """A sentence about what killed attempts left in a store; empty if they left nothing."""
    root, _ = pinned(store)
    left = storage_verify.orphans(root)
    if not left:
        return ""
    held = megabytes(sum(size_of(root / name) or 0 for name in left))
    return f"{number_of(len(left), 'file')} of unfinished attempts, {held}: of no harm and of no use"


def sealable(out: Path) -> tuple[int, dict[str, str]]:
    """(draws, shards that may be missing, with reasons) of the next generation: at least what the newest one has."""
    newest, draws = seal.newest(out), _complete_draws(out)
    if newest is None:
        return complete_draws(out), {}
    if draws > newest.draws:
        return draws, {}
    return newest.draws, {hole.name: hole.reason for hole in newest.excluded}


def seal_complete(out: Path) -> str:
    """Seals what is complete of a store that the pipeline did not make; returns the manifest's name."""
    return seal.seal(out, *sealable(out)).path.name


def complete_draws(out: Path) -> int:
    """The number of leading draws with all shards committed. Raises StageError if there is none."""
    draws = _complete_draws(out)
    if not draws:
        raise StageError(f"{out}: no draw is complete yet; {again(out)}")
    return draws


def _complete_draws(out: Path) -> int:
    spec, done = read_spec(out), set(commits.names(out, 1000))
    draws = 0
    while all(shard_name(draws, shard) in done for shard in range(spec.shards_per_draw)):
        draws += 1
    return draws


def damaged_manifests(out: Path) -> list[Path]:
    """The unreadable manifests with their lists of shards. The store can be sealed again from its commits."""
    spec, damaged = read_spec(out), list[Path]()
    for number in seal.numbers(out):
        try:
            len(seal.load(out, number, spec).shards)  # reads the list
        except NewerSchema:
            raise
        except StorageError:
            damaged += seal.files_of(out, number)
    return damaged


def bad_shards(out: Path) -> list[str]:
    """The shards named by a commit or manifest whose files are not exactly what was committed and sealed."""
    spec, sealed = read_spec(out), dict[str, set[str]]()
    for number in seal.numbers(out):
        for entry in seal.load(out, number, spec).shards:
            sealed.setdefault(entry.name, set()).add(entry.commit_sha256)
    committed = {name.removesuffix(".json") for name in names_in(out / "commits") if fullmatch(r"d.*\.json", name)}
    return [name for name in sorted(committed | set(sealed)) if not _whole(out, spec, name, sealed.get(name, set()))]


def _whole(out: Path, spec: StoreSpec, name: str, sealed: set[str]) -> bool:
    try:
        commit = commits.read(out, name)
        if commit is None or sealed - {atomic.hash_file(commits.commit_path(out, name))[0]}:
            return False
        # In some layouts sealing moves files. No other file may use their final place, where `present` looks first.
        return all(_is(out, file) for file in (*layouts.present(out, spec, commit), commit.index))
    except StorageError:
        return False


def _is(out: Path, file: StoredFile) -> bool:
    path = inside(out, file.path)  # a file behind a link out of the store does not count
    return size_of(path) == file.bytes and atomic.hash_file(path) == (file.sha256, file.bytes)


def files_of_shards(out: Path, names: list[str]) -> list[Path]:
    """What must be removed so that these shards are made again, in the order of removal.

    First the manifests that list them, so that a killed repair leaves no sealed store with a hole. Then files that
    sealing moved, which only the commits name. Then the commits. Then payloads and index parts of all attempts.
    """
    spec, bad = read_spec(out), set(names)
    manifests = [
        file
        for number in seal.numbers(out)
        if not bad.isdisjoint(seal.load(out, number, spec).shards.texts("name"))
        for file in seal.files_of(out, number)
    ]
    own = [path for folder in ("commits", "shards", "index") for name in names for path in _named(out / folder, name)]
    placed = [out / path for name in names for path in layouts.of(spec).placed(spec, name)]
    return manifests + [path for path in placed if size_of(path) is not None] + own


def _named(folder: Path, name: str) -> list[Path]:
    return [folder / found for found in names_in(folder) if found.startswith(f"{name}.")]
