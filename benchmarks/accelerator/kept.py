"""What the calls in one folder found, which a later call goes on with, and who may write there."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.told import machine, versions

STATE = "state.json"
RESULTS = Path("results/gpu")
INNER = ("output", "to_remove")  # words of the state that are none of the JSON
DRAWN = "drawn flowers"  # the images of a trial without --images
ANEW = "give another --work, or remove it"


class Kept:
    """The rows of pieces by name, in `folder/state.json`, and all but where it is in the JSON for the reader."""

    def __init__(self, folder: Path, plan: str, card: str, images: Path | None, output: Path | None) -> None:
        self.folder, self.here = folder, {"machine": machine(), "versions": versions("nfm-pairs", "torch", "numpy")}
        of = DRAWN if images is None else hashlib.sha256(images.read_bytes()).hexdigest()
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        fresh = {
            "output": str(_unused(f"{slug}-{day}")), "plan": plan, "card": card, **self.here,
            "command": "python -m benchmarks.accelerator", "images": of, "pieces": {},
        }  # fmt: skip
        self.state = {"images": DRAWN} | self._read() if (folder / STATE).exists() else fresh
        if (self.state["plan"], self.state["card"]) != (plan, card):
            told = f"holds the {self.state['plan']} run of {self.state['card']}, and this is the {plan} one of {card}"
            raise click.UsageError(f"{folder}: {told}: {ANEW}")
        if self.state["images"] != of:
            raise click.UsageError(
                f"{folder}: its images are {self.state['images'][:13]}, and those of --images are {of[:13]}: {ANEW}"
            )
        if output:
            self.state["output"] = str(output)
        self._remove()

    @property
    def pieces(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = self.state["pieces"]
        return rows

    def is_done(self, name: str) -> bool:
        found = self.pieces.get(name)
        return found is not None and not {"unfinished", "failed"} & found.keys()

    def forget(self, rows: Iterable[str], files: Iterable[str]) -> None:
        """Removes rows and what they left in the folder; a call that is killed here leaves it to the next one."""
        for name in rows:
            self.pieces.pop(name, None)
        self.state["to_remove"] = list(files)
        self.save()
        self._remove()

    def _remove(self) -> None:
        for name in self.state.pop("to_remove", []):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Keeps a row, with its machine and versions where they are not those of the first one."""
        others = {key: value for key, value in self.here.items() if value != self.state.get(key)}
        self.pieces[name] = dict(row) | others
        self.save()

    def save(self) -> None:
        write(self.folder / STATE, self.state)
        write(Path(self.state["output"]), {key: value for key, value in self.state.items() if key not in INNER})

    def _read(self) -> dict[str, Any]:
        path = self.folder / STATE
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            rows = [state[key] for key in ("output", "plan", "card")], list(state["pieces"].values())
            if all(isinstance(text, str) for text in rows[0]) and all(isinstance(row, dict) for row in rows[1]):
                return state
            why = "a value is of another type"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
        raise click.UsageError(f"{path}: is not what a call leaves there ({why}): {ANEW}")


def _unused(name: str) -> Path:
    """A JSON of this name under results, numbered where another folder's work of the day has it."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (RESULTS / f"{each}.json" for each in names) if not path.exists())


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuses a folder in which another call works; one in which nothing was begun is removed again.

    The lock of artifacts (pipeline/artifacts/lock.py) needs packages that may be missing here.
    """
    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"{folder}: is a file, and --work is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise click.UsageError(f"{folder}: another call works here; wait for it, or give another --work") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
        os.close(handle)


def write(path: Path, body: Mapping[str, Any]) -> None:
    """All of a file or nothing, so that a call that is killed leaves the state before."""
    write_bytes(path, (json.dumps(body, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
