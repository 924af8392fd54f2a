"""A pair store of very many shards: how long it takes to list, plan, seal, open and audit it, and in how much memory.

`python -m benchmarks.scale --shards 200000` makes a synthetic store (no images: payloads are sparse files of the size
that their commits state; index parts, commits and manifest are real) and measures each step in a process of its own.
The figures go to `results/scale/`, with the machine's description and the command.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.told import machine, versions
from nfm.pipeline.cli.options import LOCAL_PATH, OutputFile
from nfm.stages.display.endings import JSON
from nfm.stages.display.tables import aligned
from nfm.stages.executors.jobs import jobs_of
from nfm.storage import PairStore
from nfm.storage.files import digested_json
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.index import index_rows
from nfm.storage.format.spec import FORMAT, StoreSpec, parse_name, read_spec, write_spec
from nfm.storage.layouts import tar_blocks
from nfm.storage.ledger import commits
from nfm.storage.ledger import seal as generations

MOST_SHARDS = 100_000  # of one draw
MISSING = 0.01  # of the commits, when pending shards are listed
TARGETS = {"pending": 10.0, "audit": 60.0}  # seconds, at 200,000 shards on two cores
MEMORY_TARGET = 1024.0  # MiB, for every step
ATTEMPT = "scale1"


def spec_of(shards: int, records: int) -> tuple[StoreSpec, int]:
    """(recipe, draws) of a store of that many shards."""
    draws = -(-shards // MOST_SHARDS)
    if shards % draws:
        raise click.UsageError(f"--shards {shards}: make it divisible by the {draws} draws that it takes")
    spec = StoreSpec(
        rows=shards // draws * records,
        rows_per_shard=records,
        fields=pair_fields((3, 64, 64)),
        coupling="nfm",
        source="5ca1e" * 12 + "5ca1",
        classes=1000,
    )
    return spec, draws


def make(folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Writes the store, unsealed: a part of its shards on each core, without waiting for the disk."""
    spec, draws = spec_of(shards, records)
    write_spec(folder, spec)
    for name in ("shards", "index", "commits"):
        (folder / name).mkdir(exist_ok=True)
    names = generations.pending(folder, spec, draws)
    parts = [(folder, spec, names[at : at + 500]) for at in range(0, len(names), 500)]
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        for _ in pool.imap_unordered(_make_part, parts):
            pass
    return {"made": len(names)}


def _make_part(part: tuple[Path, StoreSpec, list[str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, spec, names = part
    for name in names:
        draw, shard = parse_name(name)
        slots, rng = np.array(spec.slots_of(shard)), np.random.default_rng(parse_name(name))
        rows = {
            "slot": slots,
            "flip": rng.integers(0, 2, len(slots)),
            "label": rng.integers(0, 1000, len(slots)),
            "nll": rng.standard_normal(len(slots), np.float32),
        }
        table, sink = index_rows(draw, rows), pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        index = sink.getvalue().to_pybytes()
        keys = digested_json.digest("\n".join(table["key"].to_pylist()).encode())  # see index.keys_digest
        size = tar_blocks.shard_bytes(spec.fields, len(slots), spec.rows_per_block)
        commit = _commit(name, len(slots), size, index, keys, rng)
        (folder / commit["index"]).write_bytes(index)
        with open(folder / commit["payload"], "wb") as file:
            file.truncate(size)
        path = commits.commit_path(folder, name)
        path.write_bytes(digested_json.digested_text(path, {"format": FORMAT, **commit}))


def _commit(name: str, records: int, size: int, index: bytes, keys: str, rng: np.random.Generator) -> dict[str, Any]:
    draw, shard = parse_name(name)
    mean, var, skewness, kurtosis = (rng.standard_normal(4) * 1e-3 + (0, 1, 0, 3)).tolist()
    return {
        "name": name, "draw": draw, "shard": shard, "attempt": ATTEMPT,
        "payload": f"shards/{name}.{ATTEMPT}.tar", "payload_sha256": digested_json.digest(name.encode()),
        "payload_bytes": size, "index": f"index/{name}.{ATTEMPT}.parquet", "index_sha256": digested_json.digest(index),
        "index_bytes": len(index), "records": records, "keys_digest": keys,
        "moments": {"mean": mean, "var": var, "min": -5.1, "max": 5.2, "skewness": skewness, "kurtosis": kurtosis,
                    "nonfinite": 0},
        "clipped": 0, "parts": [], "precision": "bfloat16", "batch_size": 256, "threads": 1,
        "seconds": round(float(rng.random()), 6), "versions": {"torch": "2.13.0", "nfm-pairs": "0.1.0"},
        "device": "cuda", "noise_error": 0.004,
    }  # fmt: skip


def pending(folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Lists what is pending where 1 % of the commits are missing."""
    spec, draws = spec_of(shards, records)
    gone = random.Random(0).sample(generations.names_of(spec, draws), max(1, int(MISSING * shards)))
    aside = folder.with_name(folder.name + "-aside")
    aside.mkdir()
    for name in gone:
        commits.commit_path(folder, name).rename(aside / f"{name}.json")
    try:
        seconds, found = timed(lambda: generations.pending(folder, spec, draws))
    finally:
        for name in gone:
            (aside / f"{name}.json").rename(commits.commit_path(folder, name))
        aside.rmdir()
    if found != sorted(gone):
        raise click.ClickException("the pending shards are not those that were taken away")
    return {"seconds": seconds, "pending": len(found)}


def plan(folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Makes the jobs of all shards, as a run that begins does, all at once."""
    spec, draws = spec_of(shards, records)
    seconds, jobs = timed(lambda: list(jobs_of(generations.names_of(spec, draws))))
    return {"seconds": seconds, "jobs": len(jobs)}


def seal(folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Seals the store: every commit is read and its files are looked for."""
    seconds, sealed = timed(lambda: generations.seal(folder, spec_of(shards, records)[1]))
    size = sum(path.stat().st_size for path in folder.glob("manifest.*"))
    return {"seconds": seconds, "shards": len(sealed.shards), "records": sealed.records, "manifest_bytes": size}


def opened(folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Opens the store and finds the last of its shards."""
    seconds, store = timed(lambda: PairStore.open(folder))
    return {"seconds": seconds, "draws": store.draws, "last": store.sealed.shards[-1].name}


def order(folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Finds the records of the first batches of an epoch, in both orders; opening is not counted."""
    store, spec = PairStore.open(folder), read_spec(folder)
    found: dict[str, Any] = {"seconds": 0.0, "batch_size": 256}
    for shuffle in ("full", "windowed"):
        seconds, records_found = timed(lambda how=shuffle: store.stream(0, how, 16, None).at(0, np.arange(256)))
        if not 0 <= records_found.slot.min() <= records_found.slot.max() < spec.rows:
            raise click.ClickException("slots outside the store")
        found[f"{shuffle}_seconds"] = round(seconds, 4)
        found["seconds"] += seconds
    return found


def audit(folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Runs `nfm audit FOLDER --quick`, start-up included; it must find nothing."""
    command = [sys.executable, "-m", "nfm.pipeline.cli", "audit", str(folder), "--quick"]
    seconds, done = timed(lambda: subprocess.run(command, capture_output=True, encoding="utf-8", check=False))
    if done.returncode:
        raise click.ClickException(f"nfm audit --quick: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"seconds": seconds, "verdict": "clean"}


STEPS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "make": make, "pending": pending, "plan": plan, "seal": seal, "open": opened, "order": order, "audit": audit,
}  # fmt: skip


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of a call."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def measured(step: str, folder: Path, shards: int, records: int) -> dict[str, Any]:
    """Runs a step in a process of its own; adds its peak memory, that of its largest child included."""
    command = [sys.executable, "-m", "benchmarks.scale", "--step", step, "--folder", str(folder)]
    command += ["--shards", str(shards), "--records-per-shard", str(records)]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        raise click.ClickException(f"the step {step} failed; the store stays in {folder}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_step(step: str, folder: Path, shards: int, records: int) -> None:
    """Prints what `measured` reads."""
    began = time.perf_counter()
    found = {"seconds": 0.0} | STEPS[step](folder, shards, records)
    found["seconds"] = round(found["seconds"] or time.perf_counter() - began, 3)
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    click.echo(json.dumps(found | {"peak_mib": round(most / 1024, 1)}))


@click.command()
@click.option("--shards", default=200_000, show_default=True, type=click.IntRange(min=2))
@click.option("--records-per-shard", "records", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--folder", type=LOCAL_PATH, help="Where the store is made, and stays.")
@click.option(
    "-o", "--output", "--out", "out", type=OutputFile(JSON), help="The JSON file; default: results/scale/SHARDS.json."
)
@click.option("--step", type=click.Choice(list(STEPS)), hidden=True)
def main(shards: int, records: int, folder: Path | None, out: Path | None, step: str | None) -> None:
    """Measure the life of a store of very many shards."""
    if step is not None and folder is not None:
        run_step(step, folder, shards, records)
        return
    root = folder or Path(tempfile.mkdtemp(prefix="nfm-scale-")) / "store"
    steps = {}
    for name in STEPS:
        steps[name] = measured(name, root, shards, records)
        click.echo(f"{name:8} {steps[name]['seconds']:9.2f} s  {steps[name]['peak_mib']:7.0f} MiB", err=True)
    body = {
        "command": f"python -m benchmarks.scale --shards {shards} --records-per-shard {records}",
        "machine": machine(),
        "versions": versions("nfm-pairs", "numpy", "pyarrow"),
        "shards": shards, "records": shards * records,
        "store": "synthetic: payloads are sparse files, index parts and commits are real, none synced to the disk",
        "memory": "peak_mib: the largest process of a step; of `make`, of its workers",
        "targets": {"seconds": TARGETS, "peak_mib": MEMORY_TARGET},
        "steps": steps,
    }  # fmt: skip
    target = out or Path(__file__).resolve().parents[1] / "results" / "scale" / f"{shards}-shards.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    rows = [
        [name, f"{found['seconds']:.2f}", f"{found['peak_mib']:.0f}", TARGETS.get(name)]
        for name, found in steps.items()
    ]
    click.echo(aligned(["step", "seconds", "MiB", "target s"], rows, numbers=True))
    if folder is None:
        shutil.rmtree(root.parent)


if __name__ == "__main__":
    main()
