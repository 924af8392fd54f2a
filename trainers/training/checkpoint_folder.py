"""Checkpoints of a training in a folder, by torch.distributed.checkpoint: each process writes its part, in safetensors.

A checkpoint is a folder named by the examples seen. It is written under another name, in the background, and renamed
when all of it is on disk: so the newest one is always whole. It can be loaded by any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from nfm.trainers.checkpoint import CheckpointError, Tensors
from nfm.trainers.training import apart, parallel

STATE = "state.json"  # what a training is besides tensors, and how long the other files are
MOST_STATE_BYTES = 2**26
PART = "part-"  # begins the name of what is being written or removed
# One process alone is meant here, which torch's saver and loader warn of.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class CheckpointFolder:
    """The checkpoints of one training, the newest `keep` of them.

    `check` is called before anything in the folder is replaced, and raises when another process took it over. `placed`
    is called with the folder of a checkpoint that is on disk; the next one waits until it returns.
    All processes of a training call the same methods in the same order. The folder is on a disk that all of them see;
    or each has one of its `own`, and the first one keeps the checkpoints.
    """

    def __init__(
        self,
        root: Path,
        keep: int = 1,
        check: Callable[[], None] = lambda: None,
        placed: Callable[[Path], None] = lambda path: None,
        own: bool = False,
    ) -> None:
        self.root = root
        self._keep = keep
        self._check, self._placed = check, placed
        self._first = parallel.rank() == 0
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._apart = own and self._group is not None
        self._thread = ThreadPoolExecutor(1, "nfm-checkpoint")
        self._pending: Future[None] | None = None
        self._read: tuple[Path, dict[str, Any]] | None = None

    def read(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint and what `read_state` says of it, or None. Files are read once until the next save."""
        if self._apart and self._read is None:
            apart.share_out(newest(self.root) if self._first else None, self.root, self._group)
        found = newest(self.root)
        if found is not None and (self._read is None or self._read[0] != found):
            self._read = found, read_state(found)
        return self._read if found is not None else None

    def save(self, tensors: Tensors, state: Mapping[str, Any], examples_seen: int) -> None:
        """Takes a copy of the tensors now and writes it in the background; raises what went wrong with the last one."""
        self.wait()
        self._read = None
        part, final = self.root / f"{PART}{examples_seen}", self.root / f"{examples_seen:012d}"
        if self._first:
            self._check()
        if self._first or self._apart:
            for path in self.root.glob(f"{PART}*"):
                shutil.rmtree(path)
            part.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)
        writer, alone = HuggingFaceStorageWriter(str(part), save_distributed=True), self._group is None
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
        self._pending = self._thread.submit(self._publish, written, part, final, dict(state))

    def wait(self) -> None:
        """Until the checkpoint that was saved last is on disk. Raises CheckpointError when it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
        if self._group is not None:
            dist.barrier(self._group)

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """A checkpoint in hand is finished, also where training ends with an error."""
        if kind is None:
            self.wait()
        self._thread.shutdown()

    def _publish(self, written: Any, part: Path, final: Path, state: Mapping[str, Any]) -> None:
        try:
            written.result()
            if self._apart:
                apart.collect(part, self._group)
            if self._first:
                self._place(part, final, state)
        except CheckpointException as error:
            raise self._unwritten([cause for cause, _ in error.failures.values()]) from error
        except OSError as error:
            raise self._unwritten([error]) from error

    def _unwritten(self, causes: Sequence[BaseException]) -> CheckpointError:
        reasons = {str(getattr(cause, "strerror", None) or cause) for cause in causes}
        return CheckpointError(
            f"{self.root}: cannot write ({'; '.join(sorted(reasons))}); mend that and run the same command again: it "
            "goes on from an earlier checkpoint"
        )

    def _place(self, part: Path, final: Path, state: Mapping[str, Any]) -> None:
        digests = {path.name: _sha256(path) for path in sorted(part.iterdir())}
        with (part / STATE).open("w", encoding="utf-8") as file:
            json.dump({**state, "files": digests}, file, sort_keys=True)
        for path in part.iterdir():
            _sync(path)
        _sync(part)
        self._check()
        old = _whole(self.root)
        if final in old:
            _remove(final)
            old.remove(final)
        part.rename(final)
        _sync(self.root)
        for path in old[: max(0, len(old) + 1 - self._keep)]:
            _remove(path)
        self._placed(final)


def newest(root: Path) -> Path | None:
    """The newest checkpoint in a folder, or None. What a killed process left half written is not one."""
    return max(_whole(root), key=lambda path: int(path.name), default=None)


def _whole(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if re.fullmatch("[0-9]+", path.name))


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors.

    Raises CheckpointError where a file is missing or is not what was written, which the first process looks at.
    """
    try:
        if not (folder / STATE).is_file() or (folder / STATE).stat().st_size > MOST_STATE_BYTES:
            raise ValueError(f"{STATE} is no file of a checkpoint")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        digests = dict(state.pop("files"))
        if absent := [name for name in digests if not (folder / name).is_file()]:
            raise ValueError(f"{absent[0]} is missing")
        if parallel.rank() == 0:
            wrong = [name for name, sha256 in digests.items() if _sha256(folder / name) != sha256]
            if wrong:
                raise ValueError(f"{wrong[0]} is not what was written there")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no whole checkpoint: {error}; {_REMEDY}") from error
    return state


def load_tensors(folder: Path, tensors: Tensors) -> None:
    """Fills `tensors`, in place, from a checkpoint that any number of processes wrote.

    Raises CheckpointError for a checkpoint of other tensors, and for damaged files.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        found: dict[str, Any] = reader.read_metadata().state_dict_metadata
        saved = {name: tuple(tensor.size) for name, tensor in found.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        other = sorted(set(saved.items()) ^ set(wanted.items()))
        if other:
            name = other[0][0]
            raise CheckpointError(
                f"{folder}: a checkpoint of another model: {name!r} is {saved.get(name, 'not there')}, and this model "
                f"has {wanted.get(name, 'none')}; {_REMEDY}"
            )
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointError:
        raise
    except Exception as error:  # of a file's content, by whichever library reads it
        raise CheckpointError(f"{folder}: not a readable checkpoint ({error!r}); {_REMEDY}") from error


_REMEDY = "remove the folder to go on from the checkpoint before it, or from the start"


def _remove(folder: Path) -> None:
    """A checkpoint that is half removed must not look like one."""
    gone = folder.with_name(f"{PART}{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
