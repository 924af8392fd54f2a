"""`python -m benchmarks.ingest` makes the same images in every way, and never gives a rate for fewer."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.ingest import command


def test_every_way_is_measured_or_told(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    options = ["--images", "5", "--compared", "3", "--side", "32", "--folder", str(tmp_path), "-o", str(output)]
    result = CliRunner().invoke(command.ingest, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["way"]: row for row in found["rows"]}
    assert len(rows) == 9
    for source in ("images", "webdataset", "parquet"):
        assert rows[f"source {source}"]["images"] == 3
        assert rows[f"source {source}"]["images_per_core_second"] > 0
    assert rows["the data stage, all at once"]["images"] == found["images"] == 5
    assert list(tmp_path.iterdir()) == [output]
    assert all(("not_measured" in row) != ("images_per_core_second" in row) for row in rows.values())


def test_a_way_that_loses_an_image_has_no_rate() -> None:
    with pytest.raises(click.ClickException, match="lossy gave 2 images of 3"):
        command.one_turn({"lossy": lambda scratch: 2}, 3, {}, {})
