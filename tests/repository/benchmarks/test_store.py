"""The benchmarks run, say what they could not measure, and never give a rate for wrong data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.store.command import store
from benchmarks.store.peers import PEERS
from benchmarks.store.rows import COPY, INLINE, ROWS, Reading, Triple, Workload, checked_epoch, copied, tensors

ROOT = Path(__file__).resolve().parents[3]


def run(tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    output = tmp_path / "store.json"
    result = CliRunner().invoke(
        store, ["--quick", "--folder", str(tmp_path), "-o", str(output), *arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"], "stores were left behind"
    return json.loads(output.read_text()), result.output


def test_a_quick_run_measures_every_section_and_what_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", os.fdatasync)  # the tests' own does nothing
    body, text = run(tmp_path)
    rows = {row["name"]: row for row in body["reading"]}
    assert list(rows) == [row.name for row in (*ROWS, *PEERS)]
    for row in (*ROWS, *PEERS):
        line = rows[row.name]
        assert ("records_per_second" in line) != ("not_measured" in line)
        assert row.name in text
        if row.kind != "peer":
            assert line["records_per_second"] > 0
        elif "not_measured" in line:
            assert line["not_measured"].startswith("not installed: "), line
    assert rows[COPY]["of_plain_copy"] == 1
    assert set(body["writing"]["share_of_plain"]) == {"blocks", "samples", "zarr"}
    assert body["opening"]["seconds"]["open"] > 0
    assert body["cold"]["cache_dropped"]["resident_before"] < 0.5
    assert 0 <= body["student"]["data_wait_share"] <= 1
    assert all({"target", "measured", "met"} <= set(line) for line in body["targets"])
    assert {"cpu", "cores", "python"} <= set(body["machine"])


def test_only_what_was_asked_for_is_measured(tmp_path: Path) -> None:
    body, _ = run(tmp_path, "--only", "parquet")
    assert [row["name"] for row in body["reading"]] == [COPY, INLINE, "Parquet, row groups in a pool"]
    assert not {"writing", "opening", "cold", "student"} & set(body)


@pytest.mark.parametrize("fault", ["lost", "twice", "altered", "mixed up", "none"])
def test_a_reading_that_loses_repeats_or_alters_records_is_refused(tmp_path: Path, fault: str) -> None:
    work = Workload(tmp_path, 64, (1, 4, 4), 16)
    order = {"lost": np.arange(63), "twice": np.append(np.arange(63), 0)}.get(fault, np.arange(64))

    def epoch(_: int) -> Iterator[Triple]:
        for start in range(0, len(order), 16):
            rows = order[start : start + 16]
            image, noise, label = (work.data[name][rows] for name in ("image", "noise", "label"))
            if fault == "altered":
                image[0, 0, 0, 0] += 1
            if fault == "mixed up":
                noise = noise[::-1].copy()
            yield tensors([image, noise, label])

    if fault == "none":
        assert checked_epoch(work, Reading(epoch), 60) == 64
        assert checked_epoch(work, copied(work), 60) == 64
    else:
        with pytest.raises(ValueError):
            checked_epoch(work, Reading(epoch), 60)


def test_the_codec_study_runs_and_obeys_shannon(tmp_path: Path) -> None:
    output = tmp_path / "codecs.json"
    command = [sys.executable, "-m", "benchmarks.codecs", "--values", "40000", "--passes", "1", "-o", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = {row["name"]: row for row in json.loads(output.read_text())["sources"][0]["rows"]}
    assert {"float32", "float16", "int8, step 1/20"} <= set(rows)
    assert rows["float32"]["rms_error"] == 0
    for row in rows.values():
        if row.get("gap_bits") is not None:
            assert row["gap_bits"] > -0.05, row  # of a small sample: a bound on averages
