"""From a pair store to the device: this piece alone needs the library's base packages (pyarrow, pydantic)."""

from __future__ import annotations

import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.accelerator.job import Job
from benchmarks.accelerator.rates import short

NEEDED = ("pyarrow", "pydantic", "fsspec")
RECORDS, BATCH = 40_000, 256


def reader(job: Job) -> dict[str, Any]:
    """Records a second that arrive on the device, and the share of a training step that waits for them."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return {"not_measured": f"the reader of a store needs {', '.join(NEEDED)}: {error}"}
    import torch

    from benchmarks.store.rows import Workload
    from benchmarks.store.student import waiting

    tiny = job.plan.name == "tiny"
    with tempfile.TemporaryDirectory(prefix="nfm-reader-") as folder:
        work = Workload(Path(folder), 512 if tiny else RECORDS, job.plan.paper.image_shape, BATCH)
        batches = work.store("blocks").batches(BATCH, epochs=None, device=job.device)
        stream = iter(batches)
        next(stream)
        began, done = time.perf_counter(), 0
        while not done or time.perf_counter() - began < job.plan.seconds:
            done += len(next(stream).image)
            if job.device.startswith("cuda"):
                torch.cuda.synchronize(job.device)
        rate = done / (time.perf_counter() - began)
        batches.close()
        # float32 image and noise of a record, as they are on the device
        there = 8 * int(torch.tensor(work.shape).prod())
        return {"records_per_second": short(rate), "device_gb_per_second": short(rate * there / 1e9),
                "student": waiting(Path(folder), tiny)}  # fmt: skip
