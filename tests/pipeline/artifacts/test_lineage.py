"""Lineage: from any artifact back to the data, and forward to what needs it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline.artifacts.lineage import ancestors, as_json, input_names, inputs_of, tree

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_ancestors_come_inputs_first_each_once(lab: Lab, root: Path) -> None:
    found = [artifact.path for artifact in ancestors(lab.only("report"))]
    assert len(found) == len(set(found)) == 9
    for artifact in ancestors(lab.only("report")):
        for needed in inputs_of(artifact).values():
            assert found.index(needed.path) < found.index(artifact.path)
    assert [a.name.split("/")[0] for a in ancestors(lab.only("student"))] == ["data", "teacher", "pairs", "student"]
    assert [a.name.split("/")[0] for a in ancestors(lab.only("student", "independent"))] == ["data", "pairs", "student"]


def test_what_an_artifact_was_made_from_is_named_unless_its_spec_is_damaged(lab: Lab, root: Path) -> None:
    pairs = lab.only("pairs")
    assert set(input_names(pairs)) == {lab.only(stage).name for stage in ("data", "teacher")}
    assert input_names(lab.only("data")) == []
    (pairs.path / "spec.json").write_text("{}")
    assert input_names(pairs) == []


def test_a_missing_and_an_unfinished_ancestor_are_shown_as_such(lab: Lab, root: Path) -> None:
    student = lab.only("student")
    teacher, data = lab.only("teacher").path, lab.only("data").path
    (teacher / "manifest.json").unlink()
    shutil.rmtree(data)
    text = "\n".join(tree(student))
    assert f"teacher: teacher/{teacher.name}  (not finished)" in text
    assert f"data: data/{data.name}  (missing)" in text


@pytest.mark.usefixtures("root")
def test_a_damaged_spec_ends_the_walk_there_and_is_listed(lab: Lab) -> None:
    spec = lab.only("teacher").path / "spec.json"
    spec.write_text(spec.read_text().replace('"version": 1', '"version": 2'))
    assert lab.all("teacher")[0].path in [artifact.path for artifact in ancestors(lab.only("student"))]


@pytest.mark.usefixtures("root")
def test_machines_get_the_same_lineage(lab: Lab) -> None:
    rows = as_json(lab.only("student"))
    assert [row["artifact"] for row in rows] == [artifact.name for artifact in ancestors(lab.only("student"))]
    assert rows[0]["inputs"] == {}
    assert rows[-1]["inputs"]["pairs"]["content_digest"] == rows[-2]["content_digest"]
