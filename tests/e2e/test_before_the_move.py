"""Artifacts made before the folders of this repository moved: they open, resume, grow and audit clean."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nfm.storage import PairStore
from tests.support.lab import Lab

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "artifacts-before-the-move"
# Made by commit 52576c7: data, teacher, a sealed store of nfm pairs and a student on it; and, as a kill leaves them,
# a store of independent pairs that lacks its second shard, and a student that stopped at a checkpoint.
DONE = {"data/6fab02d58a64", "teacher/7c3a23b6a857", "pairs/1862f6346fa5", "student/32c2615ee902"}
STARTED = {"pairs/8c5ca33a18ae", "student/ab8a3ffffd05"}


@pytest.fixture
def before(tmp_path: Path) -> Lab:
    shutil.copytree(FIXTURE / "made", tmp_path / "artifacts")
    shutil.copy(FIXTURE / "before.toml", tmp_path / "tiny.toml")
    return Lab(tmp_path)


def states(lab: Lab) -> dict[str, str]:
    return {row[0]: row[1] for row in map(str.split, lab.nfm("ls").stdout.splitlines()[1:])}


def test_what_was_done_is_done_and_nothing_is_made_again(before: Lab) -> None:
    assert states(before) == dict.fromkeys(DONE, "done") | dict.fromkeys(STARTED, "started")
    committed = before.committed()
    before.run("student")
    assert before.committed() == committed
    before.nfm("audit", "--deep", "student/32c2615ee902")


def test_what_had_stopped_goes_on_under_the_same_names(before: Lab) -> None:
    committed = before.committed()
    before.run("pairs", "pairs.coupling=independent")
    before.run("student", "student.seed=1", "student.pairs=8192", "student.log_every=512")
    assert states(before) == dict.fromkeys(DONE | STARTED, "done")
    after = before.committed()
    went_on = {"checkpoint.safetensors", "metrics.jsonl"}
    assert {name: after[name] for name in committed if Path(name).name not in went_on} == {
        name: digest for name, digest in committed.items() if Path(name).name not in went_on
    }
    for name in sorted(STARTED):
        before.nfm("audit", "--deep", name)


def test_a_store_grows_by_a_draw(before: Lab) -> None:
    before.run("pairs", "pairs.draws=2")
    store = PairStore.open(before.artifacts / "pairs/1862f6346fa5")
    assert (store.generation, store.draws) == (2, 2)
    assert PairStore.open(before.artifacts / "pairs/1862f6346fa5", generation=1).draws == 1
    before.nfm("audit", "--deep", "pairs/1862f6346fa5")
