"""The root may hold a user's own folders: no command takes them for artifacts, and gc leaves them alone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_folders_of_somebody_else_are_neither_listed_nor_removed_nor_audited(empty: Lab) -> None:
    folder = empty.folder / "work"
    for name, text in (
        ("data/photos/spec.json", '{"camera": 3}'), ("pairs/shoes/spec.json", "[1]"), ("student/anna/thesis.txt", "x"),
        ("data/0123456789ab/.tmp-1-aa-x", "mine"), ("report/draft/.tmp-1-aa-x", "mine"), ("cache/0123456789ab/x", "x"),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    (folder / "teacher/nobody").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    here = {"NFM_ARTIFACTS": str(folder)}
    assert "no artifacts under" in empty.nfm("ls", **here).stdout
    empty.nfm("gc", "--yes", "--older-than", "0", **here)
    assert sorted(folder.rglob("*")) == before
    for place in ("data/photos", folder / "data/photos", "student/anna", "phot"):
        assert "no artifact" in empty.nfm("audit", place, exits=2, **here).stderr


def test_an_artifact_that_lost_its_spec_is_damaged_and_not_somebody_elses(lab: Lab) -> None:
    spec, name = lab.only("data").path / "spec.json", lab.name("data")
    for damage in (lambda: spec.write_text("{}"), spec.unlink):
        damage()
        (line,) = (line for line in lab.nfm("ls").stdout.splitlines() if line.startswith(name))
        assert line.split()[1] == "damaged"
        told = lab.nfm("audit", name.partition("/")[2], exits=1).stdout
        assert "1 FINDING " in told
        assert str(spec) in told
        assert lab.nfm("lineage", name, exits=1).stderr.startswith(f"nfm: {spec}: ")


def test_an_empty_root_is_the_folder_of_artifacts_and_a_home_is_expanded(empty: Lab) -> None:
    empty.run("data", NFM_ARTIFACTS="")
    assert (empty.folder / "artifacts/data").is_dir()
    assert not (empty.folder / "data").exists()
    shutil.rmtree(empty.artifacts)
    empty.run("data", NFM_ARTIFACTS="~/art", HOME=str(empty.folder))
    assert (empty.folder / "art/data").is_dir()
    assert not (empty.folder / "~").exists()
