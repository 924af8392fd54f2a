"""Resume, shown: a reader that is killed at random batches yields the same sequence as one that never was.

`python -m benchmarks.kill_reader [--kills 100] [--seed 0]` reads a small store for many epochs in a child process that
does what a trainer does: after every batch it writes down what it has seen together with the reader's state, in one
step. The child is killed (SIGKILL) a moment after seeded random batches, wherever it then is; the next child goes
on from what was written, on 1, 2 or 4 ranks by chance. The whole journal is then compared with an uninterrupted reader
on one rank: the same batches in the same order, byte for byte, no record lost, none twice. Writes
`benchmarks/results/kill_reader.json`; exit 1 when anything differs.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from nfm.pipeline.cli.options import OutputFile
from nfm.stages.display.endings import JSON
from nfm.storage import Batch, PairStore, PairWriter, StoreSpec
from nfm.storage.format.fields import pair_fields

ROWS, BATCH, SHAPE, DRAWS = 4000, 128, (1, 8, 8), 2
BATCHES_PER_KILL = 24
WORLD_SIZES = (1, 2, 4)
Shuffle = Literal["full", "windowed"]
SHUFFLES: tuple[Shuffle, ...] = ("full", "windowed")


@dataclass(frozen=True)
class Plan:
    """What is read: the store, for so many epochs, in one of the orders."""

    store: Path
    epochs: int
    shuffle: Shuffle

    @property
    def batches(self) -> int:
        """Global batches of all epochs."""
        return self.epochs * -(-ROWS // BATCH)

    def reader(self, rank: int, world_size: int) -> Any:
        """One rank's reader; the last batch of an epoch is short and kept, so that no record is left out."""
        return PairStore.open(self.store).batches(
            BATCH,
            seed=7,
            epochs=self.epochs,
            shuffle=self.shuffle,
            window=3,
            last="keep",
            rank=rank,
            world_size=world_size,
        )


def make_store(root: Path) -> Path:
    """Random pairs in two draws, in shards of 512 and blocks of 64: the last ones are short."""
    spec = StoreSpec(
        rows=ROWS,
        rows_per_shard=512,
        rows_per_block=64,
        fields=pair_fields(SHAPE),
        coupling="independent",
        source="random",
    )
    rng = np.random.default_rng(0)
    with PairWriter(root, spec, DRAWS) as writer:
        for draw in range(DRAWS):
            image = rng.integers(0, 256, (ROWS, *SHAPE), np.uint8)
            noise = rng.standard_normal((ROWS, *SHAPE), np.float32)
            writer.write(image=image, noise=noise, label=np.arange(ROWS) % 10, draw=draw)
    return root


def seen(parts: Sequence[Batch]) -> dict[str, Any]:
    """What a global batch was, from the parts of its ranks in their order: its records' slots, and all its bytes."""
    digest = hashlib.sha256()
    for name in ("slot", "label", "image", "noise"):
        digest.update(np.concatenate([np.asarray(getattr(part, name)) for part in parts]).tobytes())
    slots = np.concatenate([part.slot for part in parts]).tolist()
    draw = int(np.ravel(parts[0].draw)[0])
    return {"epoch": parts[0].epoch, "draw": draw, "slots": slots, "sha256": digest.hexdigest()}


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines that were written whole."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines[:-1]]


def child(plan: Plan, journal: Path, world_size: int, progress: Connection) -> None:
    """Goes on where the journal ends, all ranks in this process, one line and one sign of life a batch."""
    done = read_journal(journal)
    readers = [plan.reader(rank, world_size) for rank in range(world_size)]
    if done:
        for reader in readers:
            reader.load_state_dict(done[-1]["state"])
    whole = sum(len(line) + 1 for line in journal.read_bytes().split(b"\n")[:-1]) if journal.exists() else 0
    file = os.open(journal, os.O_WRONLY | os.O_CREAT)
    os.ftruncate(file, whole)  # a line that the kill tore
    os.lseek(file, 0, os.SEEK_END)
    for parts in zip(*readers):
        line = seen(parts) | {"world_size": world_size, "state": readers[0].state_dict()}
        assert all(reader.state_dict() == line["state"] for reader in readers)
        os.write(file, json.dumps(line).encode() + b"\n")
        progress.send_bytes(b".")


def run_and_kill(plan: Plan, journal: Path, kills: int, seed: int) -> int:
    """Children one after the other until the epochs are done; returns how many of them were killed."""
    chance = random.Random(seed)
    targets = sorted(chance.sample(range(1, plan.batches - BATCHES_PER_KILL), kills))
    context = multiprocessing.get_context("fork")  # warm: a child starts in milliseconds
    written = killed = 0
    for target in [*targets, plan.batches + 1]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(plan, journal, chance.choice(WORLD_SIZES), theirs))
        process.start()
        theirs.close()
        target = max(target, written + 1)
        try:
            while written < target:
                ours.recv_bytes()
                written += 1
            time.sleep(chance.uniform(0, 0.003))  # wherever it is by then
            process.kill()
            killed += 1
        except EOFError:  # it ended by itself: everything is read
            pass
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise SystemExit(f"a child failed with exit code {process.exitcode}")
        written = len(read_journal(journal))
    return killed


def uninterrupted(plan: Plan) -> Iterator[dict[str, Any]]:
    """What one reader sees that nobody kills."""
    return (seen([batch]) for batch in plan.reader(0, 1))


def compare(plan: Plan, journal: list[dict[str, Any]]) -> dict[str, Any]:
    """The journal beside an uninterrupted reader, and its records counted by epoch."""
    found = [{name: line[name] for name in ("epoch", "draw", "slots", "sha256")} for line in journal]
    counts = Counter((line["epoch"], slot) for line in found for slot in line["slots"])
    return {
        "batches": len(found),
        "records": sum(counts.values()),
        "records_lost": plan.epochs * ROWS - len(counts),
        "records_twice": sum(count - 1 for count in counts.values()),
        "sequences_equal": found == list(uninterrupted(plan)),
        "batches_by_world_size": dict(sorted(Counter(str(line["world_size"]) for line in journal).items())),
    }


@click.command()
@click.option("--kills", default=100, show_default=True, help="Of each order, full and windowed.")
@click.option("--seed", default=0, show_default=True, help="Of the batches to kill at and of the numbers of ranks.")
@click.option("-o", "--output", default="benchmarks/results/kill_reader.json", show_default=True, type=OutputFile(JSON))
def main(kills: int, seed: int, output: Path) -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store")
        for shuffle in SHUFFLES:
            epochs = 2 + -(-kills * BATCHES_PER_KILL * BATCH // ROWS)
            plan, journal = Plan(store, epochs, shuffle), Path(folder) / f"{shuffle}.jsonl"
            started = time.perf_counter()
            killed = run_and_kill(plan, journal, kills, seed)
            seconds = round(time.perf_counter() - started, 1)
            results[shuffle] = {"kills": killed, "seconds": seconds} | compare(plan, read_journal(journal))
    body = {
        "kills": sum(result["kills"] for result in results.values()),
        "records_lost": sum(result["records_lost"] for result in results.values()),
        "records_twice": sum(result["records_twice"] for result in results.values()),
        "sequences_equal": all(result["sequences_equal"] for result in results.values()),
        "by_order": results,
        "store": {"rows": ROWS, "draws": DRAWS, "batch": BATCH, "shape": list(SHAPE)},
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(body, indent=2))
    if not body["sequences_equal"] or body["records_lost"] or body["records_twice"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
