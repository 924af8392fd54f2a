"""What is there and what would run, as rows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline import planning
from nfm.pipeline.artifact import ArtifactError
from nfm.pipeline.config import load
from nfm.pipeline.graph import build

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_costs_grow_with_what_they_count(lab: Lab, root: Path) -> None:
    lab.drop("teacher", "pairs", "student", "evaluate", "report")

    def cost(stage: str, *overrides: str) -> dict[str, str]:
        rows = {row["stage"]: row for row in planning.plan(build(load(lab.config, overrides)), "student")}
        assert "here" in rows["teacher"]["cost"]
        return {part.split(" ", 1)[1]: part.split(" ", 1)[0] for part in rows[stage]["cost"].split(", ")}

    assert cost("pairs")["pairs"] == "512"
    small, large = cost("teacher")["FLOPs"], cost("teacher", "teacher.images=30000")["FLOPs"]
    assert float(large) == pytest.approx(10 * float(small), rel=0.1)
    assert float(cost("student", "student.depth=4")["FLOPs"]) > float(cost("student")["FLOPs"])


def test_the_age_and_size_of_an_artifact_are_those_of_its_files(lab: Lab, root: Path) -> None:
    teacher = lab.only("teacher").path
    past = time.time() - 3 * 86400
    os.utime(teacher / "spec.json", (past, past))
    (teacher / "big").write_bytes(bytes(3_000_000))
    row = next(row for row in planning.inventory() if row["artifact"] == lab.name("teacher"))
    assert row["age"] == "3 d"
    assert row["size"].endswith(" MB")
    assert 3 <= int(row["size"].split()[0]) <= 5


def test_columns_stand_under_their_names() -> None:
    text = planning.as_text([{"a": "x", "long name": 1}, {"a": "longer", "long name": 22}])
    assert text.splitlines() == ["a       long name", "x       1", "longer  22"]


def test_only_a_store_has_a_recipe_to_show(lab: Lab, root: Path) -> None:
    info = planning.store_info(lab.only("pairs"))
    assert info["store"] == lab.name("pairs")
    assert info["order key"] == planning.store_info(lab.only("pairs", "independent"))["order key"]
    with pytest.raises(ArtifactError, match="is no pair store"):
        planning.store_info(lab.only("teacher"))
