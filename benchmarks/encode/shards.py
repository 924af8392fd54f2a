"""What shards cost over the bare loop that encodes their images, and what Ray costs over the serial executor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.encode.rows import ETA, Case
from benchmarks.store.rows import in_turns
from nfm.stages.encoding import probe
from nfm.stages.encoding.encoder import Setup
from nfm.stages.executors.jobs import Job, Outcome, new_attempt
from nfm.stages.trained.devices.machine import threads
from nfm.stages.trained.devices.precision import Precision, autocast_dtype
from nfm.stages.trained.weights import WEIGHTS
from nfm.storage import DatasetWriter, StoreSpec
from nfm.storage.files import atomic
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import shard_name, write_spec

SHARD_SECONDS = 1.0  # of encoding; real shards are longer, and their fixed costs smaller
SHARDS = 5  # the first is not counted


class Never:
    """A halt that nobody turns."""

    stopping = ending = False


class Workshop:
    """Data, teacher and any number of stores in a folder, all small and real."""

    def __init__(self, folder: Path, case: Case, precision: Precision, batch: int, rate: float) -> None:
        from nfm.trainers.checkpoint import pack_weights

        self.folder, self.case, self.precision, self.batch = folder, case, precision, batch
        self.records = max(1, round(rate * SHARD_SECONDS / batch)) * batch
        self.stores = 0
        rows = self.records * SHARDS
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (rows, *case.image_shape), np.uint8)
        labels = np.arange(rows) % max(case.classes, 1) - (0 if case.classes else 1)
        writer = DatasetWriter(folder / "data", "noise", case.image_shape, [str(k) for k in range(case.classes)])
        writer.write_split("train", rows, [(images, labels.astype(np.int64), [f"{row:09d}" for row in range(rows)])])
        writer.close()
        teacher = folder / "teacher"
        architecture = case.architecture() | {"image_shape": list(case.image_shape)}
        atomic.write_bytes(teacher / WEIGHTS, pack_weights(case.model(), architecture))
        atomic.write_json(teacher / "teacher.json", {"eta": ETA, "sigma_f": 1.0, "architecture": architecture})

    def store(self) -> Setup:
        """A new, empty store and what an encoder needs to fill it."""
        self.stores += 1
        root = self.folder / f"store-{self.stores}"
        write_spec(root, StoreSpec(
            rows=self.records * SHARDS, rows_per_shard=self.records,
            fields=pair_fields(self.case.image_shape, label=bool(self.case.classes)),
            coupling="nfm", source="bench", eta=ETA, sigma_f=1.0, teacher="bench", classes=self.case.classes or None,
        ))  # fmt: skip
        return Setup(
            store=str(root), data=str(self.folder / "data"), teacher=str(self.folder / "teacher"),
            teacher_sha256=atomic.hash_file(self.folder / "teacher" / WEIGHTS)[0], batch_size=self.batch,
            precision=self.precision, device=self.case.device, threads=self.case.threads,
        )  # fmt: skip

    def jobs(self) -> list[Job]:
        return [Job(shard_name(0, shard), new_attempt()) for shard in range(SHARDS)]


def end_to_end(shop: Workshop, passes: int) -> dict[str, Any]:
    """Shards read, encoded, rounded, hashed and committed by the serial executor, beside the bare loop."""
    from nfm.stages.executors import serial
    from nfm.trainers.couplings.coupling import NFM

    encode = probe.encoding(
        NFM(shop.case.model(), ETA, 1.0, shop.case.device, autocast_dtype(shop.precision)),
        shop.case.image_shape, shop.case.classes,
    )  # fmt: skip
    outcomes: list[Outcome] = []

    def bare() -> float:
        with threads(shop.case.threads):
            encode(shop.batch)
            started = time.perf_counter()
            for _ in range(shop.records // shop.batch):
                encode(shop.batch)
            return shop.records / (time.perf_counter() - started)

    def shards() -> float:
        ended = [outcome for outcome in serial.run(shop.store(), shop.jobs(), 1, Never()) if outcome is not None]
        outcomes.extend(_good(ended[1:]))  # the first warms up and measures the precision
        return median(shop.records / outcome.timing.wall for outcome in ended[1:] if outcome.timing)

    found = in_turns({"bare": bare, "shards": shards}, passes)
    timings = [outcome.timing for outcome in outcomes if outcome.timing]
    return {
        "how": f"{shop.precision}, batch {shop.batch}, {shop.records} records a shard, float16 noise, serial executor",
        "bare_images_per_second": round(median(found["bare"]), 1),
        "shard_images_per_second": round(median(found["shards"]), 1),
        "shards_over_bare": round(median(b / s for b, s in zip(found["shards"], found["bare"])), 3),
        "seconds_of_wall": {
            part: round(median(getattr(timing, part) / timing.wall for timing in timings), 3)
            for part in ("read", "encode", "write")
        },
    }


def ray_over_serial(shop: Workshop, passes: int) -> dict[str, Any]:
    """The same shards by one Ray actor and by the serial executor, of equal threads, in pairs that alternate.

    A rate is of the shards after the first; what comes before that, less one shard, is the start-up.
    """
    from nfm.stages.executors import ray, serial

    found: dict[str, list[tuple[float, float]]] = {"serial": [], "ray": []}
    with _local_ray(shop.case):
        for number in range(passes):
            order: list[tuple[str, ModuleType]] = [("serial", serial), ("ray", ray)]
            for name, executor in order if number % 2 == 0 else order[::-1]:
                found[name].append(_production(shop, executor))
    ratios = [b[0] / a[0] for a, b in zip(found["serial"], found["ray"])]
    return {
        "how": f"one worker of {shop.case.threads} threads, {SHARDS} shards of {shop.records} records, "
        f"{passes} pairs",
        "images_per_second": {name: round(median(rate for rate, _ in runs), 1) for name, runs in found.items()},
        "ray_over_serial": round(median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "startup_seconds": {name: round(median(startup for _, startup in runs), 2) for name, runs in found.items()},
    }  # fmt: skip


def _production(shop: Workshop, executor: ModuleType) -> tuple[float, float]:
    """(images a second after the first shard, seconds of start-up)."""
    setup, started, ends = shop.store(), time.perf_counter(), []
    for outcome in executor.run(setup, shop.jobs(), 1, Never()):
        if outcome is not None:
            _good([outcome])
            ends.append(time.perf_counter() - started)
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    return shop.records / each, ends[0] - each


def _good(outcomes: list[Outcome]) -> list[Outcome]:
    for outcome in outcomes:
        if outcome.commit is None:
            raise RuntimeError(f"{outcome.job.name} failed:\n{outcome.error}")
    return outcomes


@contextmanager
def _local_ray(case: Case) -> Iterator[None]:
    """A cluster that outlives the runs, so that their start-up is the actors' own."""
    import ray

    from nfm.stages.executors.ray_cluster import start_local

    start_local(case.threads)
    try:
        yield
    finally:
        ray.shutdown()
