"""Checks whether a store holds what its manifests say. It only reads. It names every wrong file and the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from nfm.storage import layouts
from nfm.storage.errors import StorageError
from nfm.storage.files.atomic import content_digest
from nfm.storage.files.paths import as_path, size_of
from nfm.storage.files.small_files import read_bytes
from nfm.storage.format.order import order_key
from nfm.storage.format.spec import SPEC
from nfm.storage.ledger import seal
from nfm.storage.ledger.generation import Generation, slots_of
from nfm.storage.ledger.standing import unsealed
from nfm.storage.ledger.sums import Sums
from nfm.storage.verify.content import close
from nfm.storage.verify.files import LEVELS, Finding, Level, finding_of, leads_outside, surplus
from nfm.storage.verify.row_fields import check_fields
from nfm.storage.verify.shards import COPY, check_shards
from nfm.storage.verify.survey import Survey, load, survey

__all__ = ["LEVELS", "Finding", "Level", "orphans", "verify"]
_RESEAL = "restore it from a copy, or set it aside and run `nfm pairs seal` on the store"


def verify(store_root: str | Path, generation: int | None = None, level: Level = "quick") -> list[Finding]:
    """Everything that is wrong with a store, or with one generation of it. An empty list means that it is intact.

    `quick`: files exist with their sizes, commits and manifests match their digests and each other, and no file is
    unexplained. `default` also hashes every file and reads the shards: every slot once, keys and labels equal in shard
    and index, noise finite, moments as committed. `deep` also reads every record through the stock readers. Shards are
    checked in parallel; nothing is changed. Files of killed attempts are not findings, see `orphans`. Raises
    StorageError if a stock reader is not installed, and nothing else.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: use one of {', '.join(LEVELS)}")
    root = as_path(store_root)
    try:
        found = survey(root)
    except StorageError as error:
        return [finding_of("quick", root / SPEC, error, f"{COPY}, it is the store's recipe")]
    if level == "deep":
        layouts.of(found.spec).check_stock_reader()
    wanted = [generation] if generation is not None else list(found.generations) or [1]
    checked = check_shards(found, wanted, generation is None, level)
    empty = Sums(found.spec)
    findings = [
        finding for number in wanted for finding in _manifest_findings(found, number, checked.sums.get(number, empty))
    ]
    findings += [*checked.findings, *_metadata_findings(found, found.draws(wanted))]
    named, more = check_fields(root, level)
    return findings + more + surplus(root, found.spec, named | found.named() | checked.files)[0]


def orphans(store_root: str | Path) -> list[str]:
    """Files that killed attempts left, relative to the store. They are harmless and unused."""
    found = survey(as_path(store_root))
    files = check_shards(found, (), False, "quick").files | found.named()
    return surplus(found.root, found.spec, check_fields(found.root, "quick")[0] | files)[1]


def _manifest_findings(found: Survey, number: int, sums: Sums) -> Iterator[Finding]:
    path = seal.manifest_path(found.root, number)
    sealed = found.generations.get(number) or load(found.root, number, found.spec)
    if isinstance(sealed, StorageError):
        yield finding_of("quick", path, sealed, f"restore it, or {unsealed(found.root)}")
        return
    problems = [*_list_problems(found, sealed), *_sum_problems(sealed, sums)]
    yield from (Finding("quick", str(path), problem, _RESEAL) for problem in problems)


def _list_problems(found: Survey, sealed: Generation) -> Iterator[str]:
    """Compares the list in a manifest with what a generation of these draws must hold."""
    spec, shards, holes = found.spec, sealed.shards, sealed.excluded
    if problem := sealed.hole_problem():
        yield problem
        return
    expected, listed = sealed.expected_names(), shards.texts("name")
    if listed != expected:
        odd = sorted(set(listed) ^ set(expected)) or ["their order"]
        yield f"does not list each shard once: {', '.join(odd[:8])}"
    if len(set(listed)) < len(listed):
        files = Counter(file.path for entry in shards for file in found.files(entry))
        if twice := [file for file, times in files.items() if times > 1]:
            yield f"lists a file twice: {', '.join(twice[:8])}"
    if sealed.content_digest != content_digest(shards.texts("sha256")):
        yield "its content digest is not that of its shards"
    if sealed.records != spec.rows * sealed.draws - sum(len(hole.slots) for hole in holes):
        left = f" less {len(holes)} excluded shards" if holes else ""
        yield f"{sealed.records} records, not {spec.rows} x {sealed.draws}{left}"
    if sealed.order_key != order_key(spec.source, spec.rows, sealed.draws, slots_of(holes)):
        yield "its order key is not that of the spec"
    for key, value in (("bytes", sealed.bytes), ("shard_count", len(shards))):
        if sealed.body.get(key, value) != value:
            yield f"its {key} is {sealed.body[key]}, {value} by its shards"


def _sum_problems(sealed: Generation, sums: Sums) -> Iterator[str]:
    """Compares the totals in a manifest with its commits; no problem if some are unreadable, as that is already a
    finding.
    """
    if sums.shards != len(sealed.expected_names()):
        return
    body, stated = sums.body(), sealed.body
    moments = stated.get("moments")
    if not (isinstance(moments, Mapping) and all(close(v, moments.get(name)) for name, v in body["moments"].items())):
        yield "its moments are not those of its commits"
    if stated.get("clipped", 0) != body["clipped"]:
        yield "its clipped values are not those of its commits"
    for key in ("noise_error", "precision", "batch_sizes"):
        if key in stated and stated[key] != body[key]:
            yield f"its {key} is not that of its commits"


def _metadata_findings(found: Survey, draws: int) -> Iterator[Finding]:
    """Checks the metadata for stock readers. It depends only on the recipe, so every byte is known."""
    for name, data in layouts.of(found.spec).metadata(found.spec, draws).items():
        path = found.root / name
        if size_of(path) is None:
            yield Finding("quick", str(path), "the file is missing", _RESEAL)
        elif size_of(path) != len(data) or leads_outside(found.root, path) or read_bytes(path, root=found.root) != data:
            yield Finding("quick", str(path), "is not what the store's recipe gives", _RESEAL)
