"""`python -m benchmarks.ingest` decodes the same images in every way, and never gives a rate for fewer."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import ingest


def test_every_way_is_measured_or_told(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    options = ["--images", "3", "--side", "32", "--passes", "1", "-o", str(output)]
    result = CliRunner().invoke(ingest.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {row["way"]: row for row in json.loads(output.read_text(encoding="utf-8"))["rows"]}
    assert len(rows) == 7
    for source in ("images", "webdataset", "parquet"):
        assert rows[f"source {source}"]["images_per_core_second"] > 0
    assert all(("not_measured" in row) != ("images_per_core_second" in row) for row in rows.values())


def test_a_way_that_loses_an_image_has_no_rate() -> None:
    with pytest.raises(click.ClickException, match="lossy gave 2 images of 3"):
        list(ingest.measured({"lossy": lambda scratch: 2}, 3, 1))
