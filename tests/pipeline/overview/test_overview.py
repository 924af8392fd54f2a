"""What is there, as rows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline import overview
from nfm.pipeline.artifacts.artifact import ArtifactError

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_the_age_and_size_of_an_artifact_are_those_of_its_files(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher").path
    past = time.time() - 3 * 86400
    os.utime(teacher / "spec.json", (past, past))
    (teacher / "big").write_bytes(bytes(3_000_000))
    row = next(row for row in overview.inventory() if row["artifact"] == lab.name("teacher"))
    assert row["age"] == "3 d"
    assert row["size"].endswith(" MB")
    assert 3 <= float(row["size"].split()[0]) <= 5


def test_what_others_were_made_from_was_finished_and_is_damaged_without_its_manifest(lab: Lab, root: Path) -> None:
    (lab.only("teacher").path / "manifest.json").unlink()
    (lab.only("report").path / "manifest.json").unlink()
    states = {row["artifact"]: row["state"] for row in overview.inventory()}
    assert (states[lab.name("teacher")], states[lab.name("report")]) == ("damaged", "started")
    assert "nothing to compare" in lab.nfm("audit", lab.name("teacher"), exits=1).stdout


def test_columns_stand_under_their_names() -> None:
    text = overview.as_text([{"a": "x", "long name": 1}, {"a": "longer", "long name": 22}])
    assert text.splitlines() == ["a       long name", "x       1", "longer  22"]


def test_only_a_store_has_a_recipe_to_show(lab: Lab, root: Path) -> None:
    info = overview.store_info(lab.only("pairs"))
    assert info["store"] == lab.name("pairs")
    assert info["order key"] == overview.store_info(lab.only("pairs", "independent"))["order key"]
    with pytest.raises(ArtifactError, match="is no pair store"):
        overview.store_info(lab.only("teacher"))
