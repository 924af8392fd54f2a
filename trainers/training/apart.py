"""Files of a checkpoint between processes that see no disk in common: each has a folder of its own.

What all of them wrote is collected by the first process, which alone keeps checkpoints. What it keeps is shared out to
the others before they read. All processes call the same function at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PIECE = 16 << 20  # bytes that are sent at a time


def collect(folder: Path, group: Any) -> None:
    """Brings the files that the others have in `folder` to the folder of the first process.

    Raises OSError there if they cannot be written, when all have been received: so no process waits for another.
    """
    rank = dist.get_rank()
    own = {} if rank == 0 else _sizes(folder)
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, own, group=group)
    failed: OSError | None = None
    for sender, files in enumerate(written):
        for name, size in files.items():
            if rank == sender:
                for piece in _read(folder / name, size):
                    dist.send(piece, dst=0, group=group)
            elif rank == 0:
                failed = _write(folder / name, _received(size, sender, group)) or failed
    if failed is not None:
        raise failed


def share_out(folder: Path | None, root: Path, group: Any) -> None:
    """Brings a folder of the first process to the others, with its name, below `root`; nothing if it is None."""
    rank = dist.get_rank()
    told: list[Any] = [None if folder is None else (folder.name, _sizes(folder))]
    dist.broadcast_object_list(told, src=0, group=group)
    if told[0] is None:
        return
    name, files = told[0]
    target, failed = root / name, None
    target.mkdir(parents=True, exist_ok=True)
    for file, size in files.items():
        if rank == 0:
            for piece in _read(target / file, size):
                dist.broadcast(piece, src=0, group=group)
        else:
            failed = _write(target / file, _broadcast(size, group)) or failed
    if failed is not None:
        raise failed


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _lengths(size: int) -> Iterator[int]:
    yield from (min(_PIECE, size - start) for start in range(0, size, _PIECE))


def _read(path: Path, size: int) -> Iterator[torch.Tensor]:
    with path.open("rb") as file:
        for length in _lengths(size):
            yield torch.frombuffer(bytearray(file.read(length)), dtype=torch.uint8)


def _received(size: int, sender: int, group: Any) -> Iterator[torch.Tensor]:
    for length in _lengths(size):
        piece = torch.empty(length, dtype=torch.uint8)
        dist.recv(piece, src=sender, group=group)
        yield piece


def _broadcast(size: int, group: Any) -> Iterator[torch.Tensor]:
    for length in _lengths(size):
        piece = torch.empty(length, dtype=torch.uint8)
        dist.broadcast(piece, src=0, group=group)
        yield piece


def _write(path: Path, pieces: Iterator[torch.Tensor]) -> OSError | None:
    """Writes all pieces. If the disk does not take them, the rest is received nevertheless."""
    try:
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece.numpy().data)
    except OSError as error:
        for _ in pieces:
            pass
        return error
    return None
