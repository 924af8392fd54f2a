"""The small files of a store: its recipe and its manifests, read once, and its commits, one after another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from nfm.storage import layouts
from nfm.storage.errors import StorageError
from nfm.storage.files import folder as listing
from nfm.storage.files import signed_json
from nfm.storage.files.atomic import digest, hash_file
from nfm.storage.files.durable import StoredFile
from nfm.storage.files.paths import is_remote, size_of
from nfm.storage.format.commit import parse
from nfm.storage.format.spec import StoreSpec, parse_name, read_spec
from nfm.storage.layouts import Entry
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.commits import Commit
from nfm.storage.ledger.shard_list import ShardList, is_list_name, texts


@dataclass(frozen=True)
class Listed:
    """A shard that a manifest or a commit names: its entries, by generation, and whether it has a commit."""

    name: str
    entries: list[tuple[int, Entry]]
    committed: bool


@dataclass(frozen=True)
class Survey:
    """The small files of a store. An unreadable manifest is replaced by its error."""

    root: Path
    spec: StoreSpec
    manifests: dict[int, dict[str, Any] | StorageError]
    commits: list[str]  # the shards that have a commit
    sizes: dict[str, int]  # of the plain files in the folders of payloads and index parts

    def readable(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The readable manifests of these generations."""
        for number in numbers:
            manifest = self.manifests.get(number)
            if isinstance(manifest, dict):
                yield manifest

    def draws(self, numbers: Iterable[int]) -> int:
        """The number of draws of the largest of these generations."""
        return max((manifest["draws"] for manifest in self.readable(numbers)), default=0)

    def shards(self) -> Iterator[Listed]:
        """Every shard that a manifest lists or that is committed, by name."""
        streams: list[Iterable[tuple[str, int, Entry | None]]] = [((name, 0, None) for name in self.commits)]
        streams += [_by_name(manifest) for manifest in self.readable(self.manifests)]
        for name, group in groupby(merge(*streams, key=itemgetter(0, 1)), key=itemgetter(0)):
            found = list(group)
            yield Listed(name, [(at, entry) for _, at, entry in found if entry is not None], found[0][2] is None)

    def named(self) -> set[str]:
        """Every file that a manifest names, relative to the store, wherever sealing has placed it."""
        names: set[str] = set()
        for manifest in self.readable(self.manifests):
            shards = manifest["shards"]
            if not layouts.of(self.spec).by_field:
                names.update(texts(shards, "payload"), texts(shards, "index"))
                continue
            names |= {file for entry in shards for file in self.all_files(entry)}
        committed = 1 + max((parse_name(name)[0] for name in self.commits), default=-1)
        draws = max(committed, self.draws(self.manifests))
        return names | self._lists() | set(layouts.of(self.spec).metadata(self.spec, draws))

    def all_files(self, source: Entry | Commit) -> set[str]:
        """The files of a shard, both where they were written and where sealing places them."""
        return {file.path for where in (True, False) for file in self.files(source, where)}

    def files(self, source: Entry | Commit, sealed: bool = True) -> list[StoredFile]:
        """The payload files of a shard, then its index part; empty if they do not fit the layout of the spec."""
        try:
            payload = layouts.files(self.spec, source, sealed)
        except StorageError:
            return []
        if isinstance(source, Mapping):
            return [*payload, StoredFile(source["index"], source["index_sha256"], source["index_bytes"])]
        return [*payload, StoredFile(source.index, source.index_sha256, source.index_bytes)]

    def present(self, source: Entry | Commit) -> list[StoredFile]:
        """The files of a shard where they are now. In layout zarr, sealing a draw moves them."""
        placed = self.files(source)
        if isinstance(source, Mapping):
            return placed
        pairs = zip(placed, self.files(source, sealed=False))
        return [here if size_of(self.root / here.path) is not None else staged for here, staged in pairs]

    def _lists(self) -> set[str]:
        """The lists of shards that manifests name or may name: lists of unreadable manifests are kept."""
        shards = [manifest["shards"] for manifest in self.readable(self.manifests)]
        known = {found.file for found in shards if isinstance(found, ShardList) and found.file is not None}
        unread = tuple(f"manifest.g{at:04d}." for at, body in self.manifests.items() if not isinstance(body, dict))
        names = {name for name in listing.names(self.root, "") if is_list_name(name)} if unread else set()
        return known | {name for name in names if name.startswith(unread)}


def survey(root: Path) -> Survey:
    """Reads the recipe and the manifests of the store at `root`, and lists its commits and files.

    Raises StorageError if there is no recipe.
    """
    spec = read_spec(root)
    manifests = {number: load(root, number) for number in seal.numbers(root)}
    try:
        names = [name for name in commits.names(root, 1000) if parse_name(name)[1] < spec.shards_per_draw]
    except StorageError:
        names = []  # a link out of the store; it is reported as a surplus file
    return Survey(root, spec, manifests, names, listing.shard_files(root))


def load(root: Path, number: int) -> dict[str, Any] | StorageError:
    """The manifest of a generation, or the error why it cannot be read."""
    try:
        return seal.load(root, number)
    except StorageError as error:
        return error


def read_commit(
    root: Path, folder: listing.Folder, name: str, entries: Sequence[Entry], trusting: bool
) -> tuple[Commit | StorageError | None, str]:
    """(the commit of a shard, or None if there is none, or the error why it cannot be read; the SHA-256 of its file).

    With `trusting`, a file with the SHA-256 of one of these entries needs no check of its own digest. Its contents are
    always checked.
    """
    path, data = commits.commit_path(root, name), folder.read(f"{name}.json")
    if data is not None:
        sha256 = digest(data)
        try:
            if trusting and any(entry["commit_sha256"] == sha256 for entry in entries):
                body = json.loads(data)
            else:
                body = signed_json.checked(path, data, signed=True)
            if isinstance(body, dict):
                return parse(path, name, body), sha256
        except (StorageError, ValueError, RecursionError) as error:
            if isinstance(error, StorageError) and not is_remote(root):
                return error, sha256
    try:
        commit = commits.read(root, name)
        return commit, hash_file(path)[0] if commit is not None else ""
    except StorageError as error:
        return error, ""


def _by_name(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int, Entry]]:
    """The entries of a manifest sorted by name. They are already sorted unless another program wrote the manifest."""
    names, shards = texts(manifest["shards"], "name"), manifest["shards"]
    if any(one > two for one, two in pairwise(names)):
        shards = sorted(shards, key=itemgetter("name"))
    return ((entry["name"], manifest["generation"], entry) for entry in shards)
