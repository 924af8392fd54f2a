"""`python -m benchmarks.store.bucket`: what a bucket costs in requests, and in time at 30 ms a request.

A server in a process of its own (`benchmarks/store/s3.py`) counts requests and answers each after `--delay` seconds.
Counted: shards of pairs written, an epoch of batches and one of a student that trains on them (cold: nothing is here;
warm: from the cache), a stage of two files committed, a lock, `nfm ls` of `--artifacts` artifacts on a machine that
lists them for the first and the second time. Writes JSON to `-o`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import told
from benchmarks.store.student import trained
from nfm.pipeline.artifacts.artifact import open_spec, publish
from nfm.pipeline.artifacts.lock import Lock
from nfm.pipeline.cli.options import OutputFile
from nfm.pipeline.overview import inventory
from nfm.stages.base import Result
from nfm.stages.display.endings import JSON
from nfm.storage import PairStore, PairWriter, ShardCache, StoreSpec
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path, several

LOCK_SECONDS = 12  # two beats and a little
SHAPE, RECORDS = (3, 32, 32), 512  # of an image; records of a shard
STUDENT, BATCH = {"patch": 8, "width": 64, "depth": 1, "head_size": 64}, 256
TURNS = 2


@contextmanager
def server(delay: float) -> Iterator[str]:
    """The server in a process of its own; this process finds it by its environment."""
    words = [sys.executable, "-m", "benchmarks.store.s3", str(delay)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint, "NFM_ARTIFACTS": "s3://bucket/run",
    }  # fmt: skip
    try:
        yield endpoint
    finally:
        process.communicate()


def counted(endpoint: str, action: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of an action, those of this process's processors, and its requests."""
    asked(endpoint)
    began, computed = time.perf_counter(), time.process_time()
    action()
    seconds, computed = time.perf_counter() - began, time.process_time() - computed
    return {"seconds": round(seconds, 3), "cpu_seconds": round(computed, 3), "requests": asked(endpoint)}


def asked(endpoint: str) -> dict[str, int]:
    """The requests since the last call, by kind."""
    with urllib.request.urlopen(f"{endpoint}/-/asked") as answer:
        return dict(sorted(json.load(answer).items()))


def write_store(where: str, shards: int) -> None:
    """A store of so many shards."""
    rng = np.random.default_rng(0)
    spec = StoreSpec.external(
        image_shape=SHAPE, rows=shards * RECORDS, rows_per_shard=RECORDS, origin="a benchmark", seed=0
    )
    with PairWriter(where, spec) as writer:
        for _ in range(shards):
            image = rng.integers(0, 256, (RECORDS, *SHAPE), dtype=np.uint8)
            writer.write(image=image, noise=rng.standard_normal((RECORDS, *SHAPE), np.float32))


def read_store(where: str, cache: Path) -> None:
    """One epoch of a student, without a student."""
    store = PairStore.open(where, cache=ShardCache(cache)) if where.startswith("s3:") else PairStore.open(where)
    for _ in store.batches(batch_size=BATCH, seed=0, epochs=1):
        pass


def train(where: str, cache: Path) -> dict[str, Any]:
    """A student that sees each pair of a store once: its rate, and the share of its time that it waits for pairs."""
    store = PairStore.open(where, cache=ShardCache(cache)) if where.startswith("s3:") else PairStore.open(where)
    batches, pairs = store.batches(batch_size=BATCH, seed=0, epochs=1, device="cpu"), len(store)
    (line,) = trained(batches, SHAPE, STUDENT, pairs, BATCH, "cpu", log_every=pairs)
    return {
        "pairs_per_second": round(pairs / line["seconds"]),
        "data_wait_share": round(line["data_wait_share"], 4),
    }


def students(endpoint: str, local: str, url: str, folder: Path) -> dict[str, dict[str, Any]]:
    """A student of each kind, in turns: of each, the turn in which it was the fastest."""
    rows: dict[str, dict[str, Any]] = {}
    import torch

    torch.set_num_threads(1)  # one core is left to the server
    train(local, folder)  # what the first one alone waits for: imports
    for turn in range(TURNS):
        for name, place in (("local", local), ("cold", url), ("warm", url)):
            row: dict[str, Any] = {}
            row |= counted(endpoint, lambda: row.update(train(place, folder / f"turn{turn}")))  # noqa: B023
            known = rows.get(f"a student, {name}")
            if known is None or row["pairs_per_second"] > known["pairs_per_second"]:
                rows[f"a student, {name}"] = row
    return rows


def commit_stage() -> None:
    """What a run does around a stage that leaves two files."""
    artifact = as_path("s3://bucket/run/teacher/0123456789ab")
    with Lock(artifact) as lock:
        body = {"stage": "teacher", "fingerprint": "0" * 64, "inputs": {}}
        open_spec(artifact, body)
        out = mirror.prepare(artifact)
        for name in ("weights.safetensors", "metrics.jsonl"):
            atomic.write_bytes(out / name, bytes(1 << 20))
        publish(
            artifact, Result(payload=["weights.safetensors"], metrics={}, files=["metrics.jsonl"]), body, lock.check
        )


def hold_lock() -> None:
    with Lock(as_path("s3://bucket/run/student/0123456789ab")):
        time.sleep(LOCK_SECONDS)


def fill(artifacts: int) -> None:
    """Artifacts as a list shows them: a tenth are stores, of ten shards each; the others have four files."""
    root = as_path("s3://bucket/run")

    def put(number: int) -> None:
        stage = "pairs" if number % 10 == 0 else ("student", "evaluate", "teacher")[number % 3]
        folder = root / stage / f"{number:012x}"
        body = {"stage": stage, "fingerprint": f"{number:064x}", "inputs": {"data": {"artifact": "data/000000000000"}}}
        atomic.write_json(folder / "spec.json", body)
        for file in range(10 if stage == "pairs" else 2):
            atomic.write_bytes(folder / ("shards" if stage == "pairs" else ".") / f"file{file}", b"")
        manifest = "manifest.g0001.json" if stage == "pairs" else "manifest.json"
        atomic.write_json(folder / manifest, {**body, "bytes": 10, "config": {"padding": "x" * 2000}})

    several(root, put, range(artifacts))


@click.command()
@click.option("--delay", default=0.03, show_default=True, type=click.FloatRange(0, 10), help="Seconds of each answer.")
@click.option("--artifacts", default=1000, show_default=True, type=click.IntRange(0, 100_000), help="That are listed.")
@click.option("--shards", default=16, show_default=True, type=click.IntRange(1, 10_000), help="That are written.")
@click.option("-o", "--output", default="results/bucket/bucket.json", show_default=True, type=OutputFile(JSON))
def main(delay: float, artifacts: int, shards: int, output: Path) -> None:
    """Count requests to a bucket, and measure what waits for them."""
    with tempfile.TemporaryDirectory() as folder, server(delay) as endpoint:
        os.environ |= {"NFM_CACHE": f"{folder}/cache", "NFM_SCRATCH": f"{folder}/scratch"}
        url, cache, rows = "s3://bucket/store", Path(folder) / "shards", {}
        write_store(f"{folder}/store", shards)
        rows["a lock held for 12 s"] = counted(endpoint, hold_lock)
        rows["a stage of two files committed"] = counted(endpoint, commit_stage)
        rows[f"{shards} shards written and sealed"] = counted(endpoint, lambda: write_store(url, shards))
        rows["an epoch, local"] = counted(endpoint, lambda: read_store(f"{folder}/store", cache))
        rows["an epoch, cold"] = counted(endpoint, lambda: read_store(url, cache))
        rows["an epoch, warm"] = counted(endpoint, lambda: read_store(url, cache))
        rows |= students(endpoint, f"{folder}/store", url, Path(folder))
        if artifacts:
            fill(artifacts)
            rows[f"nfm ls of {artifacts} artifacts, first"] = counted(endpoint, inventory)
            rows[f"nfm ls of {artifacts} artifacts, again"] = counted(endpoint, inventory)
    for name, row in rows.items():
        if name.startswith("an epoch"):
            row["records_per_second"] = round(shards * RECORDS / row["seconds"])
        click.echo(f"{name}: {row}")
    body = {
        "command": told.command("benchmarks.store.bucket"), "machine": told.machine(),
        "versions": told.versions("nfm-pairs", "numpy", "torch", "s3fs", "aiobotocore"), "delay_seconds": delay,
        "records_a_shard": RECORDS, "image_shape": SHAPE, "student": STUDENT, "batch_size": BATCH,
        "load_before": os.getloadavg()[0], "rows": rows,
    }  # fmt: skip
    output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
