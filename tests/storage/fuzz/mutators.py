"""Ways to damage a store: at random, or with knowledge of its formats, after which digests are made right again."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from .mutate_bytes import files_in, raw_bytes
from .mutate_formats import npy_header, parquet, tar_header, zarr_index
from .mutate_json import json_text, json_value
from .signing import reseal

Mutator = Callable[[Path, Path, random.Random], str]  # (store, folder outside it, randomness) -> what was done


def files(root: Path, outside: Path, rng: random.Random) -> str:
    """Files swapped, doubled, missing, more; links, folders and pipes in their places."""
    path, other = rng.choice(files_in(root)), rng.choice(files_in(root))
    ways = "swap copy missing surplus link folder-link loop dangling folder pipe empty outside"
    what = rng.choice(ways.split())
    if what == "swap":
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
    elif what == "copy":
        shutil.copy(path, path.with_name(rng.choice((f"copy-{path.name}", other.name, "manifest.g0009.json", "d003"))))
    elif what == "surplus":
        path.with_name(rng.choice(("x", ".tmp-1-2-x", "d000-s00000.b.tar", "manifest.g00001.json"))).write_bytes(b"x")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "outside":
        path.write_bytes(rng.choice(files_in(outside)).read_bytes())
    elif what == "folder-link":
        folder = rng.choice([found for found in root.iterdir() if found.is_dir()] or [root / "new"])
        shutil.rmtree(folder, ignore_errors=True)
        folder.symlink_to(rng.choice([outside, outside / folder.name, root]))
    else:
        path.unlink()
        if what == "link":
            same = [found for found in files_in(outside) if found.name == path.name] or files_in(outside)
            path.symlink_to(rng.choice(same))
        elif what == "loop":
            path.symlink_to(path.name)
        elif what == "dangling":
            path.symlink_to("nowhere")
        elif what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
    return f"{path.name}: {what}"


MUTATORS: dict[str, tuple[Mutator, int]] = {  # with their weights
    "json value": (json_value, 8),
    "json text": (json_text, 2),
    "bytes": (raw_bytes, 3),
    "tar header": (tar_header, 4),
    "npy header": (npy_header, 4),
    "zarr index": (zarr_index, 4),
    "parquet": (parquet, 3),
    "files": (files, 4),
}


def mutate(root: Path, outside: Path, rng: random.Random) -> list[str]:
    """Spoils a store in one to three ways; mostly all digests are then right again, so that what is inside is read."""
    names, weights = list(MUTATORS), [weight for _, weight in MUTATORS.values()]
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not files_in(root):
            break
        name = rng.choices(names, weights)[0]
        try:
            done.append(f"{name}: {MUTATORS[name][0](root, outside, rng)}")
        except Exception as error:  # an earlier mutation left nothing to work with
            done.append(f"not applicable: {type(error).__name__}")
    if rng.random() < 0.75:
        reseal(root)
        done.append("resealed")
    return done
