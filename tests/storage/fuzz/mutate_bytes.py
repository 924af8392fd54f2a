"""What all mutators share: the list of files, names that lead out of the store, random damage to bytes."""

from __future__ import annotations

import random
from pathlib import Path


def files_in(root: Path, *suffixes: str) -> list[Path]:
    """The files below a folder, all or those with one of these suffixes."""
    return sorted(path for path in root.rglob("*") if path.is_file() and (not suffixes or path.suffix in suffixes))


def outside_name(outside: Path, rng: random.Random) -> str:
    """A name of a file outside the store, as a commit might give it."""
    files = files_in(outside)
    name = rng.choice(files).relative_to(outside)
    return rng.choice([f"../outside/{name}", f"shards/../../outside/{name}", f"{outside}/{name}", f"//{outside}/{name}",
                       f"../../outside/{name}", f"file://{outside}/{name}", "/etc/passwd"])  # fmt: skip


def raw_bytes(root: Path, outside: Path, rng: random.Random) -> str:
    """Bytes of any file flipped, zeroed, cut out, doubled or cut off."""
    path = rng.choice(files_in(root))
    data = bytearray(path.read_bytes())
    what = rng.choice(("flip", "flip", "zero", "cut", "double", "truncate", "append", "noise"))
    at = rng.randrange(len(data) + 1) if data else 0
    size = rng.choice((1, 4, 16, 100, 512))
    if what == "flip":
        for _ in range(rng.choice((1, 3, 20))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif what == "noise":
        data[at : at + size] = rng.randbytes(len(data[at : at + size]))
    elif what == "cut":
        del data[at : at + size]
    elif what == "double":
        data[at:at] = data[at : at + size]
    elif what == "truncate":
        del data[at:]
    else:
        data += rng.randbytes(size)
    path.write_bytes(data)
    return f"{path.name}: {what} at {at}"
