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


def test_an_empty_root_is_the_folder_of_artifacts_and_a_home_is_expanded(empty: Lab) -> None:
    empty.run("data", NFM_ARTIFACTS="")
    assert (empty.folder / "artifacts/data").is_dir()
    assert not (empty.folder / "data").exists()
    shutil.rmtree(empty.artifacts)
    empty.run("data", NFM_ARTIFACTS="~/art", HOME=str(empty.folder))
    assert (empty.folder / "art/data").is_dir()
    assert not (empty.folder / "~").exists()
