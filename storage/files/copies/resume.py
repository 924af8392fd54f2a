"""States of unfinished work in a bucket, so that another machine goes on from there.

A state is a folder `resume/NUMBER-TOKEN` of an artifact. `files.json` is put last and lists the others with their
digests: without it the state does not exist. No two attempts share a token, so none overwrites files of another.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nfm.storage.files import atomic, remote
from nfm.storage.files.copies import mirror
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import as_path, exists, is_url, names_in, remove, temporary_name

FOLDER, LIST = "resume", "files.json"
_STATE = re.compile(r"(\d+)-[0-9a-f]{8}")
_FILES = 4  # files at a time


class Resume:
    """The states of the work in `out`, a folder of `mirror`, in the bucket of its artifact; of none if it is local.

    `check` raises if another process took the work over.
    """

    def __init__(self, out: Path, check: Callable[[], None]) -> None:
        origin = mirror.origin(out)
        self._artifact = as_path(origin) if is_url(origin) else None
        self._out, self._check = out, check
        self._kept: dict[str, tuple[str, int]] = {}
        self.elsewhere = self._artifact is not None

    def put(self, number: int, files: Mapping[str, Path], kept: Iterable[str] = ()) -> None:
        """Puts a state with these files, by name, and then removes all others. Raises StorageError.

        `kept` are files in `out` that never change and belong to the result. Each is brought to the artifact once.
        """
        if self._artifact is None:
            return
        self._check()
        state = self._artifact / FOLDER / f"{number:012d}-{secrets.token_hex(4)}"
        new = {name: atomic.hash_file(self._out / name) for name in kept if name not in self._kept}
        mirror.push(self._artifact, self._out, new, self._check)
        self._kept |= new
        digests = list(parallel(lambda name: _put(files[name], state / name), files, _FILES))
        self._check()
        listed = {
            what: [{"path": name, "sha256": sha256, "bytes": size} for name, (sha256, size) in found.items()]
            for what, found in (("files", dict(zip(files, digests))), ("kept", self._kept))
        }
        atomic.create_json(state / LIST, listed)
        self._remove_all(but=state.name)

    def bring(self, target: Path) -> None:
        """Brings the newest state to the folder `target`, which appears when all of it is here, and what it kept."""
        assert self._artifact is not None
        _, state = max(_whole(self._artifact))
        listed = atomic.read_json(state / LIST)
        part = target.with_name(temporary_name(target.name))
        part.mkdir(parents=True)
        for source, folder, files in ((state, part, listed["files"]), (self._artifact, self._out, listed["kept"])):
            list(parallel(lambda file: mirror.fetch(source, folder, file), files, _FILES))  # noqa: B023 used here
        self._kept = {file["path"]: (file["sha256"], file["bytes"]) for file in listed["kept"]}
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)

    def clear(self) -> None:
        """Removes all states: the work is finished."""
        if self._artifact is not None:
            self._remove_all()

    def newest(self) -> int:
        """The number of the newest state; 0 if there is none."""
        return newest(self._artifact) if self._artifact is not None else 0

    def _remove_all(self, but: str = "") -> None:
        assert self._artifact is not None
        for name in names_in(self._artifact / FOLDER):
            if name != but:
                state = self._artifact / FOLDER / name
                remove(state / LIST)
                for file in names_in(state):
                    remove(state / file)


def newest(artifact: Path) -> int:
    """The number of the newest state of the work on an artifact in a bucket; 0 if there is none."""
    return max((number for number, _ in _whole(artifact)), default=0)


def _whole(artifact: Path) -> list[tuple[int, Path]]:
    folder = artifact / FOLDER
    named = [(int(match[1]), folder / match[0]) for name in names_in(folder) if (match := _STATE.fullmatch(name))]
    return [(number, state) for number, state in named if exists(state / LIST)]


def _put(source: Path, target: Path) -> tuple[str, int]:
    """Puts a file. Returns its SHA-256 and size."""
    remote.attempt(target, "write", lambda fs, name: fs.put_file(str(source), name))
    return atomic.hash_file(source)
