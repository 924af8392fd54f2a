"""What the small files of a store say, read once: its recipe, its manifests and its commits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfm.storage import commits, generations, layout
from nfm.storage.commits import Commit
from nfm.storage.errors import StorageError
from nfm.storage.layout import Entry, StoredFile
from nfm.storage.paths import inside, names_in, size_of
from nfm.storage.schema import StoreSpec, parse_name, read_spec


@dataclass(frozen=True)
class Survey:
    """A store's small files; the error in place of one that cannot be read."""

    root: Path
    spec: StoreSpec
    manifests: dict[int, dict[str, Any] | StorageError]
    commits: dict[str, Commit | StorageError]

    def readable(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The manifests of these generations, those that can be read."""
        for number in numbers:
            manifest = self.manifests.get(number)
            if isinstance(manifest, dict):
                yield manifest

    def entries(self, numbers: Iterable[int]) -> Iterator[Entry]:
        """What the manifests of these generations list."""
        for manifest in self.readable(numbers):
            yield from manifest["shards"]

    def draws(self, numbers: Iterable[int]) -> int:
        """The draws that the largest of these generations holds."""
        return max((manifest["draws"] for manifest in self.readable(numbers)), default=0)

    def named(self) -> set[str]:
        """Every file that a manifest or a commit names, relative to the store, wherever sealing has placed it."""
        sources: list[Entry | Commit] = list(self.entries(self.manifests))
        sources += [commit for commit in self.commits.values() if isinstance(commit, Commit)]
        names = {file.path for source in sources for where in (True, False) for file in self.files(source, where)}
        committed = 1 + max((parse_name(name)[0] for name in self.commits), default=-1)
        return names | set(layout.metadata(self.spec, max(committed, self.draws(self.manifests))))

    def files(self, source: Entry | Commit, sealed: bool = True) -> list[StoredFile]:
        """A shard's payload files, then its index part; none where they are not those of the spec's layout."""
        try:
            payload = layout.files(self.spec, source, sealed)
        except StorageError:
            return []
        if isinstance(source, Mapping):
            return [*payload, StoredFile(source["index"], source["index_sha256"], source["index_bytes"])]
        return [*payload, StoredFile(source.index, source.index_sha256, source.index_bytes)]

    def present(self, source: Entry | Commit) -> list[StoredFile]:
        """The files of a shard where they are: until its draw is sealed, those of layout zarr wait to be placed."""
        placed = self.files(source)
        if isinstance(source, Mapping):
            return placed
        pairs = zip(placed, self.files(source, sealed=False))
        return [here if size_of(self.root / here.path) is not None else staged for here, staged in pairs]


def survey(root: Path) -> Survey:
    """Reads the small files of the store at `root`. Raises StorageError when there is no recipe."""
    found = Survey(root, read_spec(root), {}, {})
    for number in generations.numbers(root):
        found.manifests[number] = load(root, number)
    for file in _commit_files(root):
        name = file.removesuffix(".json")
        try:
            if name == file or parse_name(name)[1] >= found.spec.shards_per_draw:
                continue
        except StorageError:
            continue  # no name of a commit: a surplus file
        try:
            commit = commits.read(root, name)
        except StorageError as error:
            found.commits[name] = error
        else:
            if commit is not None:
                found.commits[name] = commit
    return found


def _commit_files(root: Path) -> list[str]:
    try:
        return names_in(inside(root, "commits"))
    except StorageError:
        return []  # a link out of the store, which is a surplus file


def load(root: Path, number: int) -> dict[str, Any] | StorageError:
    """The manifest of a generation, or why it cannot be read."""
    try:
        return generations.load(root, number)
    except StorageError as error:
        return error
