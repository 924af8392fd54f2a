"""Fuzzes stores and everything that reads them: spoilt in ways that a seed decides, read in a child that may die.

    python -m tests.storage.fuzz.run --minutes 10 --seed 0 --output benchmarks/results/fuzz.json
    python -m tests.storage.fuzz.run --case 1234 --seed 0      one case again, its outcomes in full

A call may end with in-bounds data or with a StorageError, verification with a list. Anything else is a defect: another
exception, a crash, more than 5 s, more than 500 MB, a file opened outside the store. A mapped file that is truncated
while it is mapped ends a process with SIGBUS; committed files never change, so that is outside the promise.
"""

from __future__ import annotations

import contextlib
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa

from . import targets
from .mutators import mutate
from .sandbox import Outcome, Watch, run

STORES = Path(__file__).resolve().parents[2] / "fixtures" / "store-format-1"
SECONDS = 5.0


@dataclass
class Tally:
    """What came out so far: calls by target and outcome, and each kind of defect once with the case that shows it."""

    cases: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    mutations: Counter[str] = field(default_factory=Counter)
    defects: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, done: list[str], outcome: Outcome) -> bool:
        """Counts an outcome; True when it is a defect of a kind that was not seen before."""
        self.outcomes.setdefault(outcome.target, Counter())[outcome.kind] += 1
        if not outcome.defect:
            return False
        place = [line.strip() for line in outcome.detail.splitlines() if "/nfm/" in line or "storage/" in line]
        kind = f"{outcome.target}: {outcome.kind} {place[-1] if place else outcome.detail[-200:]}"
        self.seen[kind] += 1
        if self.seen[kind] > 1:
            return False
        self.defects.append({"case": number, "kind": kind, "mutations": done, "detail": outcome.detail})
        return True


class Workshop:
    """A folder with the whole stores, a folder outside of them that nobody may read, and one case at a time."""

    def __init__(self, folder: Path, stores: Path) -> None:
        self.folder = folder.resolve()
        self.stores = sorted(path for path in stores.iterdir() if path.is_dir() and not path.name.startswith("_"))
        self.outside = self.folder / "outside"
        shutil.copytree(stores / "blocks", self.outside)
        (self.outside / "field.npy").write_bytes((self.outside / "fields/caption/s00000.fixture1.npy").read_bytes())
        self.watch = Watch(self.outside)

    def case(self, number: int, seed: int, seconds: float = SECONDS) -> tuple[list[str], list[Outcome]]:
        """(what was done to a store, what came of it); the same for the same number and seed."""
        rng = random.Random(f"{seed}:{number}")
        whole, case = rng.choice(self.stores), self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        root, scratch = case / whole.name, case / "scratch"
        shutil.copytree(whole, root)
        scratch.mkdir()
        done = [whole.name, *mutate(root, self.outside, rng)]
        self.watch.opened()
        tempfile.tempdir = str(scratch)
        chosen = targets.of(root, scratch)
        # Half of the targets a case: twice the cases in the same time.
        chosen = {name: chosen[name] for name in sorted(rng.sample(sorted(chosen), (len(chosen) + 1) // 2))}
        outcomes = run(chosen, [root, scratch], self.folder / "trace.txt", seconds)
        tempfile.tempdir = None
        opened = self.watch.opened()
        if done[-1] != "resealed" and (changed := _changed(whole, root)):
            outcomes = [_missed(outcome, changed) for outcome in outcomes]
        if opened:
            outcomes.append(Outcome("any", "outside", f"opened {sorted(set(opened))}"))
        return done, outcomes

    def confirmed(self, number: int, seed: int) -> tuple[list[str], list[Outcome]]:
        """A case, once more with patience where it seemed to hang: a busy machine is no finding."""
        done, outcomes = self.case(number, seed)
        if any(outcome.kind == "hang" for outcome in outcomes):
            done, outcomes = self.case(number, seed, seconds=4 * SECONDS)
        return done, outcomes


def _changed(whole: Path, root: Path) -> list[str]:
    """The files that a store has, and that are not here what they are there.

    Left out is what may go without a trace: a draw that is not sealed yet, and a field by its field.json.
    """
    names = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]
    names = [name for name in names if not name.endswith("field.json")]
    names = [name for name in names if whole.name != "session-1" or "d001" not in name]
    return [name for name in names if not (root / name).is_file() or _differ(whole / name, root / name)]


def _differ(one: Path, other: Path) -> bool:
    return one.read_bytes() != other.read_bytes()


def _missed(outcome: Outcome, changed: list[str]) -> Outcome:
    """Whatever changes under digests that were not made right again, the default level must find."""
    if outcome.kind == "clean" and outcome.target in ("verify default", "verify deep"):
        return Outcome(outcome.target, "missed", f"{changed} changed")
    return outcome


@contextlib.contextmanager
def workshop(stores: Path = STORES) -> Iterator[Workshop]:
    """A workshop in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="nfm-fuzz-") as folder:
        yield Workshop(Path(folder), stores)


def fuzz(seconds: float, seed: int, stores: Path = STORES, least: int = 0, say: Any = print) -> Tally:
    """Case after case for some seconds, and for at least some cases."""
    tally, end = Tally(), time.monotonic() + seconds
    with workshop(stores) as shop:
        while time.monotonic() < end or tally.cases < least:
            done, outcomes = shop.confirmed(tally.cases, seed)
            tally.mutations.update(step.split(": ")[0] for step in done[1:])
            for outcome in outcomes:
                if tally.add(tally.cases, done, outcome):
                    say(f"case {tally.cases}: {tally.defects[-1]['kind']}\n  {done}")
            tally.cases += 1
    return tally


def report(tally: Tally, minutes: float, seconds: float, seed: int) -> dict[str, Any]:
    """The figures as JSON."""
    return {
        "what": "hostile stores: spoilt files, read by every reader, each call in a forked child with limits",
        "command": f"python -m tests.storage.fuzz.run --minutes {minutes:g} --seed {seed}",
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
        },
        "seconds": round(seconds, 1),
        "seed": seed,
        "cases": tally.cases,
        "calls": sum(sum(counts.values()) for counts in tally.outcomes.values()),
        "mutations": dict(sorted(tally.mutations.items())),
        "outcomes": {name: dict(sorted(counts.items())) for name, counts in sorted(tally.outcomes.items())},
        "defects": sum(tally.seen.values()),
        "defect_kinds": [{key: defect[key] for key in ("case", "kind", "mutations")} for defect in tally.defects],
        "limits": {"seconds": SECONDS, "growth_mib": 500},
    }


@click.command()
@click.option("--minutes", default=10.0, help="How long.")
@click.option("--seed", default=0, help="Decides every case.")
@click.option("--case", "number", type=int, help="Only this case, with its outcomes in full.")
@click.option("--stores", default=STORES, type=click.Path(path_type=Path), help="Whole stores to begin with.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the figures go, as JSON.")
def main(minutes: float, seed: int, number: int | None, stores: Path, output: Path | None) -> None:
    """Fuzz for some minutes; exit 1 when there is a defect."""
    if number is not None:
        with workshop(stores) as shop:
            done, outcomes = shop.case(number, seed, seconds=4 * SECONDS)
        click.echo("\n".join([str(done), *(f"{o.target}: {o.kind}\n{o.detail}" for o in outcomes)]))
        sys.exit(any(outcome.defect for outcome in outcomes))
    started = time.monotonic()
    tally = fuzz(60 * minutes, seed, stores, say=click.echo)
    figures = report(tally, minutes, time.monotonic() - started, seed)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    click.echo(f"{figures['cases']} cases, {figures['calls']} calls, {figures['defects']} defects")
    sys.exit(bool(tally.defects))


if __name__ == "__main__":
    main()
