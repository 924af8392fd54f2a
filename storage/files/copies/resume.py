"""States of unfinished work in a bucket, so that another machine goes on from there.

A state is a folder `resume/NUMBER-TOKEN` of an artifact. Its last file is put last: without it the state does not
exist. No two attempts share a token, so none overwrites files of another.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from nfm.storage.files import remote
from nfm.storage.files.copies import mirror
from nfm.storage.files.durable import HashingFile
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import as_path, is_url, names_in, remove, size_of, temporary_name

FOLDER = "resume"
_STATE = re.compile(r"(\d+)-[0-9a-f]{8}")
_FILES = 4  # files at a time


class Resume:
    """The states of the work in `out`, a folder of `mirror`, in the bucket of its artifact; of none if it is local.

    `check` raises if another process took the work over. `last` is the name of the file that is put last.
    """

    def __init__(self, out: Path, last: str, check: Callable[[], None]) -> None:
        origin = mirror.origin(out)
        self._folder = as_path(origin) / FOLDER if is_url(origin) else None
        self._last, self._check = last, check

    def put(self, number: int, files: Mapping[str, Path]) -> None:
        """Puts a state, by name of its files, and then removes all others. Raises StorageError."""
        if self._folder is None:
            return
        self._check()
        state = self._folder / f"{number:012d}-{secrets.token_hex(4)}"
        list(parallel(lambda name: _put(files[name], state / name), [n for n in files if n != self._last], _FILES))
        self._check()
        _put(files[self._last], state / self._last)
        for name in names_in(self._folder):
            if name != state.name:
                self._remove(self._folder / name)

    def newest(self) -> int:
        """The number of the newest state; 0 if there is none."""
        return max((number for number, _ in self._whole()), default=0)

    def bring(self, target: Path) -> None:
        """Brings the newest state to the folder `target`, which appears when all of it is here."""
        _, state = max(self._whole())
        part = target.with_name(temporary_name(target.name))
        part.mkdir(parents=True)
        list(parallel(lambda name: _get(state / name, part / name), names_in(state), _FILES))
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)

    def clear(self) -> None:
        """Removes all states: the work is finished."""
        for name in names_in(self._folder) if self._folder is not None else ():
            self._remove(self._folder / name)  # type: ignore[operator]

    def _whole(self) -> list[tuple[int, Path]]:
        if self._folder is None:
            return []
        named = [
            (match, self._folder / match[0]) for name in names_in(self._folder) if (match := _STATE.fullmatch(name))
        ]
        return [(int(match[1]), state) for match, state in named if size_of(state / self._last) is not None]

    def _remove(self, state: Path) -> None:
        remove(state / self._last)
        for name in names_in(state):
            remove(state / name)


def _put(source: Path, target: Path) -> None:
    remote.attempt(target, "write", lambda fs, name: fs.put_file(str(source), name))


def _get(source: Path, target: Path) -> None:
    with HashingFile(target) as copy:
        for piece in remote.read_pieces(source, size_of(source) or 0):
            copy.write(piece)
