"""What a benchmark run says: the targets that hold or do not, and its tables."""

from __future__ import annotations

from typing import Any

from benchmarks.store.peers import HF_ARRAYS, HF_ARROW, HF_LISTS, LITDATA, MDS, SAMPLES, ZARR_POOL
from benchmarks.store.rows import COPY, FLOAT32, FLOAT32_PREFETCHED, INLINE, PREFETCHED, ZARR
from nfm.stages.display.tables import aligned

# What is promised: (words, least or most, bound, the figure in a run)
_AT_LEAST = (
    (INLINE, COPY, 0.5),
    (PREFETCHED, COPY, 0.4),
    (FLOAT32, COPY, 0.25),
    (FLOAT32_PREFETCHED, COPY, 0.4),
    (INLINE, SAMPLES, 20),
    (INLINE, MDS, 10),
    (INLINE, LITDATA, 10),
    (INLINE, HF_ARRAYS, 10),
    (INLINE, HF_LISTS, 10),
    (INLINE, HF_ARROW, 10),
    (ZARR, ZARR_POOL, 3),
)
_LAYOUTS = {"blocks": INLINE, "samples": "ours: samples, raw, inline", "zarr": ZARR}


def targets(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of which the run has the figure: words, bound, figure, whether it is met."""
    rows = {row["name"]: row for row in body.get("reading", [])}
    speed = {name: row.get("records_per_second") for name, row in rows.items()}
    found: list[dict[str, Any]] = []

    def add(words: str, figure: float | None, bound: float, least: bool = True) -> None:
        if figure is not None:
            met = figure >= bound if least else figure <= bound
            side = "at_least" if least else "at_most"
            found.append({"target": words, side: bound, "measured": round(figure, 4), "met": met})

    for ours, other, bound in _AT_LEAST:
        if speed.get(ours) and speed.get(other):
            add(f"{ours} / {other}", speed[ours] / speed[other], bound)
    for layout, name in _LAYOUTS.items():
        add(f"bytes over payload, {layout}", rows.get(name, {}).get("bytes_over_payload"), 1.1, least=False)
    for layout, share in _in(body, "writing", "share_of_plain").items():
        add(f"write rate over plain, {layout}", share, 0.7)
    for kind in ("open", "open_and_first_batch"):
        seconds = _in(body, "opening", "seconds").get(kind)
        add(f"seconds to {kind.replace('_', ' ')}", seconds, 0.5, least=False)
    for kind in ("cache_dropped", "memory_limited"):
        share = _in(body, "cold", kind).get("windowed_share_of_disk")
        add(f"cold windowed reads over the disk's rate, {kind.replace('_', ' ')}", share, 0.8)
    add("share of a training step that waits", _in(body, "student").get("data_wait_share"), 0.01, least=False)
    return found


def _in(body: dict[str, Any], *path: str) -> dict[str, Any]:
    for name in path:
        body = body.get(name, {})
    return body


def described(body: dict[str, Any]) -> str:
    """The run as text."""
    parts = [f"{body['command']}\n{_line(body['machine'])}\n{_line(body['versions'])}\n{_line(body['workload'])}"]
    if "reading" in body:
        header = ("reading", "records/s", "lowest", "highest", "of copy", "ours/this", "bytes/payload", "how")
        keys = (
            "name",
            "records_per_second",
            "lowest",
            "highest",
            "of_plain_copy",
            "ours_over_this",
            "bytes_over_payload",
        )
        rows = [[*(row.get(key) for key in keys), row.get("not_measured") or row["how"]] for row in body["reading"]]
        parts.append(aligned(header, rows))
    parts += [f"{name}\n{_nested(body[name])}" for name in ("writing", "opening", "cold", "student") if name in body]
    lines = [
        [line["target"], f">= {line['at_least']}" if "at_least" in line else f"<= {line['at_most']}", line["measured"],
         "yes" if line["met"] else "NO"]
        for line in body["targets"]
    ]  # fmt: skip
    return "\n\n".join([*parts, aligned(("target", "bound", "measured", "met"), lines)])


def _line(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _nested(values: dict[str, Any]) -> str:
    return "\n".join(
        f"  {name}: {_line(value) if isinstance(value, dict) else value}" for name, value in values.items()
    )
