"""`python -m benchmarks.store`: how fast pairs come off the disk and go onto it, beside peers and a plain copy."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.told import command, machine, versions
from nfm.pipeline.cli.options import LOCAL_PATH, OutputFile
from nfm.stages.display.endings import JSON

if TYPE_CHECKING:
    from benchmarks.store.rows import Reading, Row, Workload

SECTIONS = ("reading", "writing", "opening", "cold", "student")
PACKAGES = (
    "nfm-pairs", "numpy", "numba", "torch", "pyarrow", "webdataset", "mosaicml-streaming", "litdata", "datasets",
    "zarr", "tensorstore", "pylance", "array-record", "grain",
)  # fmt: skip
OUTPUT = "benchmarks/results/store.json"
SECONDS_PER_PASS = 5.0  # the slowest peers are stopped in the middle of an epoch


@click.command()
@click.option("--records", default=20_000, show_default=True, type=click.IntRange(min=1))
@click.option("--shape", default="3,64,64", show_default=True, help="C,H,W of the images.")
@click.option("--passes", default=7, show_default=True, type=click.IntRange(min=1), help="Medians are taken of these.")
@click.option(
    "--only", multiple=True, metavar="NAME", help=f"A section ({', '.join(SECTIONS)}) or part of a row's name."
)
@click.option("--cold-gib", default=4.0, show_default=True, help="Size of the store that is read cold.")
@click.option(
    "--memory-left-gib",
    default=2.5,
    show_default=True,
    help="It is read once more while another process holds all memory but this.",
)
@click.option("--open-records", default=2_000_000, show_default=True, help="Records of the store that is opened.")
@click.option("--quick", is_flag=True, help="A small run that shows that all works; its figures mean nothing.")
@click.option("--folder", type=LOCAL_PATH, help="Where to write the stores; on the disk to be measured.")
@click.option("-o", "--output", type=OutputFile(JSON), help=f"The JSON; {OUTPUT} unless --quick or --only.")
def store(
    records: int, shape: str, passes: int, only: tuple[str, ...], cold_gib: float, memory_left_gib: float,
    open_records: int, quick: bool, folder: Path | None, output: Path | None,
) -> None:  # fmt: skip
    """Read, write and open pair stores beside the peers and a plain copy: a quarter of an hour, 13 GB of disk.

    A peer that is not installed is listed as such: install `nfm-pairs[bench]`.
    """
    from benchmarks.store.rows import Workload

    sizes = tuple(int(size) for size in shape.split(","))
    if len(sizes) != 3:
        raise click.BadParameter("three numbers with commas between them", param_hint="--shape")
    if quick:
        records, sizes, passes, cold_gib, open_records = min(records, 600), (3, 16, 16), 1, 0.0, 5000
    with tempfile.TemporaryDirectory(dir=folder, prefix="nfm-bench-") as temporary:
        work = Workload(Path(temporary), records, (sizes[0], sizes[1], sizes[2]), 256)
        body = measure(work, passes, only, cold_gib, memory_left_gib, open_records, quick)
    click.echo(as_text(body))
    if output is None and not quick and not only:
        output = Path(OUTPUT)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def measure(
    work: Workload, passes: int, only: Sequence[str], cold_gib: float, memory_left_gib: float, open_records: int,
    quick: bool,
) -> dict[str, Any]:  # fmt: skip
    """The sections that were asked for, as JSON's types."""
    from benchmarks.store import disk as bench_disk
    from benchmarks.store import student

    def writing() -> dict[str, Any]:
        return bench_disk.writing(work, work.folder, max(1, min(passes, 5)))

    def opening() -> dict[str, Any]:
        return bench_disk.opening(work.folder, open_records, passes)

    def cold() -> dict[str, Any]:
        return bench_disk.cold_reading(work, work.folder, cold_gib, memory_left_gib, max(1, min(passes, 3)))

    sections: dict[str, Callable[[], Any]] = {
        "reading": lambda: reading(
            work, passes, [name for name in only if name not in SECTIONS], 0.01 if quick else SECONDS_PER_PASS
        ),
        "writing": writing,
        "opening": opening,
        "cold": cold,
        "student": lambda: student.waiting(work.folder, quick),
    }
    asked = [name for name in only if name in SECTIONS] or list(SECTIONS)
    if any(name not in SECTIONS for name in only) and not set(only) & set(SECTIONS):
        asked = ["reading"]
    body: dict[str, Any] = {
        "command": command("benchmarks.store"),
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "workload": {
            "records": work.records, "shape": list(work.shape), "image": "uint8", "noise": "float16", "label": "int64",
            "batch": work.batch, "payload_bytes": work.payload_bytes, "passes": passes,
        },
    }  # fmt: skip
    for name in SECTIONS:
        if name in asked:
            click.echo(f"measuring: {name}", err=True)
            body[name] = sections[name]()
    from benchmarks.store.targets import targets

    return {**body, "targets": targets(body)}


def reading(work: Workload, passes: int, names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Every row's records a second: the median of the passes, which take turns so that noise hits all alike."""
    from benchmarks.store.peers import PEERS
    from benchmarks.store.rows import COPY, INLINE, ROWS, checked_epoch, in_turns, rate
    from nfm.storage.reading.gathering.compiled import KINDS, loops

    for kind in KINDS:  # as a long reading does after a while
        loops.make(kind)
    rows = [row for row in (*ROWS, *PEERS) if _wanted(row, names, (COPY, INLINE))]
    ready: dict[str, Reading] = {}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found[row.name] = {"name": row.name, "kind": row.kind, "how": row.how}
        missing = [package for package in row.needs if importlib.util.find_spec(package) is None]
        if missing:
            found[row.name]["not_measured"] = f"not installed: {', '.join(missing)}"
            continue
        click.echo(f"  preparing and checking: {row.name}", err=True)
        try:
            ready[row.name] = row.make(work)
            checked_epoch(work, ready[row.name], 2 * SECONDS_PER_PASS)
        except Exception as error:
            if row.kind != "peer":
                raise
            ready.pop(row.name, None)  # one peer's trouble is told and leaves the others their figures
            found[row.name]["not_measured"] = f"failed here, {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        size = sum(_size(path) for path in ready[row.name].files)
        found[row.name]["bytes_over_payload"] = round(size / work.payload_bytes, 4) if size else None

    seeds = iter(range(1, 1_000_000))
    click.echo(f"  {passes} passes over {len(ready)} rows", err=True)
    works = {name: partial(rate, it, seeds, min(1.0, seconds), seconds) for name, it in ready.items()}
    for name, figures in in_turns(works, passes).items():
        rates, cpu_rates = zip(*figures)
        found[name] |= {
            "records_per_second": round(statistics.median(rates)) or round(statistics.median(rates), 3),
            "lowest": round(min(rates)),
            "highest": round(max(rates)),
            "records_per_cpu_second": round(statistics.median(cpu_rates)),  # of all threads, without workers
        }
    limit, inline = (found[name]["records_per_second"] for name in (COPY, INLINE))
    for line in found.values():
        if "records_per_second" in line:
            line["of_plain_copy"] = round(line["records_per_second"] / limit, 3)
            if line["kind"] == "peer":
                line["ours_over_this"] = round(inline / line["records_per_second"], 1)
    return list(found.values())


def _wanted(row: Row, names: Sequence[str], always: Sequence[str]) -> bool:
    return not names or row.name in always or any(name.lower() in row.name.lower() for name in names)


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def as_text(body: dict[str, Any]) -> str:
    """The run for people: a table a section, and the targets."""
    from benchmarks.store.targets import described

    return described(body)
