"""gc removes all garbage, and keeps what is needed, in use or unreadable."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from nfm.pipeline import builder, runner
from nfm.pipeline.artifacts.artifact import Artifact, artifacts_root
from nfm.pipeline.artifacts.lock import Lock
from nfm.pipeline.cli import cli
from nfm.pipeline.config import load
from nfm.pipeline.upkeep import gc
from nfm.pipeline.upkeep.audit import audit
from nfm.pipeline.upkeep.repair import repair_store
from nfm.stages.stores import export
from nfm.storage import PairStore
from tests.support.patience import PATIENCE

if TYPE_CHECKING:
    from tests.conftest import Lab

HOUR, DAY = 3600.0, 86400.0
WEEK = 7 * DAY
ELSEWHERE = Path(__file__).resolve().parents[3] / "configs/digits.toml"  # a config in use that reaches nothing here


def age(folder: Path, seconds: float) -> None:
    """Make everything below a folder as old as this."""
    past = time.time() - seconds
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (past, past), follow_symlinks=False)


def leave_attempt(store: Path, seconds: float) -> list[Path]:
    """What a worker leaves that is killed before its commit: payload, index part and a temporary."""
    payload, index = sorted(store.glob("shards/*.tar"))[0], sorted(store.glob("index/*.parquet"))[0]
    name = payload.name.split(".")[0]
    left = [
        payload.with_name(f"{name}.killed.tar"),
        index.with_name(f"{name}.killed.parquet"),
        payload.with_name(f".tmp-77-abcd-{name}.other.tar"),
    ]
    for path in left:
        path.write_bytes(b"half a shard")
        os.utime(path, (time.time() - seconds,) * 2)
    return left


def collect(older_than: float = WEEK, configs: tuple[Path, ...] = ()) -> list[gc.Garbage]:
    """List and remove, as the command does."""
    found = gc.listing([load(path) for path in configs or (ELSEWHERE,)], older_than)
    return gc.remove(found.going, older_than, lambda text: None)


def names(found: list[gc.Garbage], kind: str) -> set[str]:
    return {one.name for one in found if one.kind == kind}


def left_in(root: Path) -> set[str]:
    """Every artifact that is still there, by name."""
    return {f"{path.parent.parent.name}/{path.parent.name}" for path in root.glob("*/*/spec.json")}


def done_in(root: Path) -> list[Artifact]:
    """Every artifact that claims to be done, at each of its manifests."""
    return [Artifact(path.parent, path.name) for path in root.glob("*/*/manifest*.json")]


def check(root: Path) -> None:
    """What claims to be done is what it claims to be, and so is what it was made from."""
    assert [finding for result in audit(done_in(root), "quick") for finding in result.findings] == []


def in_child(action: Callable[[], object]) -> None:
    """Do something in a process of its own, which dies without cleaning up."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def killed_after(removals: int, folder: Path) -> None:
    """A gc that is killed before it removes one file more than this; it leaves `folder/ended` if it ends before."""
    unlink, left = Path.unlink, [removals]

    def counted(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        unlink(path, missing_ok)

    def work() -> None:
        Path.unlink = counted  # type: ignore[method-assign]
        collect(older_than=0)
        (folder / "ended").touch()

    in_child(work)


def test_a_dry_run_lists_all_that_would_go_and_changes_nothing(lab: Lab, root: Path) -> None:
    age(root, 8 * DAY)
    leave_attempt(lab.only("pairs").path, 2 * HOUR)
    lab.drop("report", "evaluate")
    shutil.rmtree(lab.only("student", "independent").path)
    age(lab.only("pairs", "independent").path, 8 * DAY)
    before = lab.committed()
    told = lab.nfm("gc", "-c", ELSEWHERE, "--dry-run").stdout
    assert lab.committed() == before
    assert f"{lab.name('pairs', 'independent')}  (nothing depends on it)" in told
    assert "its worker was killed before the commit" in told
    assert "would go: 1 attempt, 1 temporary, 2 artifacts: " in told
    body = json.loads(lab.nfm("gc", "-c", ELSEWHERE, "--dry-run", "--json").stdout)
    assert {one["kind"] for one in body["found"]} == {"attempt", "temporary", "artifact"}
    assert body["removed_bytes"] == 0
    assert lab.committed() == before


def test_leftovers_go_and_readers_of_the_store_do_not_notice(lab: Lab, root: Path) -> None:
    store = lab.only("pairs")
    before = lab.committed()
    reader = iter(PairStore.open(store.path).batches(batch_size=64, seed=0))
    head = [next(reader).noise.copy()]
    left = leave_attempt(store.path, 2 * HOUR)
    receipt = store.path / "audits" / ".tmp-5-ab-receipt.json"
    receipt.parent.mkdir(exist_ok=True)
    receipt.write_bytes(b"{")
    os.utime(receipt, (time.time() - 2 * HOUR,) * 2)
    gone = collect()
    assert len(names(gone, "attempt")) == 1
    assert len(names(gone, "temporary")) == 2
    assert not any(path.exists() for path in [*left, receipt])
    assert lab.committed() == before
    rest = head + [batch.noise.copy() for batch in reader]
    again = [batch.noise.copy() for batch in PairStore.open(store.path).batches(batch_size=64, seed=0)]
    np.testing.assert_array_equal(np.concatenate(rest), np.concatenate(again[: len(rest)]))
    assert collect() == []


def test_an_attempt_goes_only_when_none_of_its_files_changed_for_an_hour(lab: Lab, root: Path) -> None:
    left = leave_attempt(lab.only("pairs").path, 2 * HOUR)
    os.utime(left[1])  # its index part is being written; its payload has lain still
    assert names(collect(), "attempt") == set()
    assert left[0].exists()
    assert left[1].exists()


def test_files_of_a_shard_whose_commit_is_unreadable_are_left_to_repair(lab: Lab, root: Path) -> None:
    store = lab.only("pairs").path
    commit = sorted(store.glob("commits/*.json"))[0]
    (store / "manifest.g0001.json").unlink()
    commit.write_text(commit.read_text().replace('"records": 64', '"records": 63'))
    age(store, 2 * HOUR)
    payload = next(store.glob(f"shards/{commit.stem}.*"))
    collect()
    assert payload.exists()


def test_gc_removes_what_a_repair_set_aside_but_no_generation_number_is_used_again(lab: Lab, root: Path) -> None:
    store = lab.only("pairs")
    payload = sorted(store.path.glob("shards/*.tar"))[3]
    payload.write_bytes(payload.read_bytes()[:-1])
    repair_store(store)
    (aside,) = (store.path / "quarantine").iterdir()
    assert names(collect(), "quarantine") == set()  # younger than an hour
    aside.rename(aside.with_name("20200101T000000Z"))
    assert len(names(collect(), "quarantine")) == 1
    assert [path.name for path in (store.path / "quarantine").rglob("*.*")] == ["manifest.g0001.json"]
    again = runner.run(builder.build(load(lab.config)), "pairs")
    assert again.manifest_name == "manifest.g0002.json"
    assert len(names(collect(), "quarantine")) == 1
    assert not (store.path / "quarantine").exists()
    check(root)


def test_nothing_goes_that_a_student_or_report_was_made_from(lab: Lab, root: Path) -> None:
    age(root, 100 * DAY)
    before = lab.committed()
    assert collect(older_than=0) == []
    assert lab.committed() == before


def test_a_chain_goes_as_a_whole_unless_a_config_reaches_it(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    before = left_in(root)
    other = lab.folder / "other.toml"
    other.write_text(lab.config.read_text().replace("eta = 0.15", "eta = 0.2"))
    assert collect(configs=(lab.config, other)) == []
    teacher, store = lab.name("teacher"), lab.name("pairs")
    assert names(collect(configs=(other,)), "artifact") == {teacher, store}
    kept = left_in(root)
    assert {name.split("/")[0] for name in kept} == {"data", "features", "pairs"}
    assert kept < before
    assert len(names(collect(), "artifact")) == 3
    assert left_in(root) == set()
    assert collect() == []


def test_links_to_other_disks_neither_go_nor_hide_what_is_needed(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate")
    disk = lab.folder / "disk"
    shutil.move(root / "pairs", disk / "pairs")
    (root / "pairs").symlink_to(disk / "pairs")
    student = lab.only("student", "independent").path
    shutil.move(student, disk / student.name)
    student.symlink_to(disk / student.name)
    age(disk, 8 * DAY)
    age(root, 8 * DAY)
    assert {one.split("/")[0] for one in names(collect(), "artifact")} == {"features"}
    shutil.rmtree(lab.only("student").path)
    assert {one.split("/")[0] for one in names(collect(), "artifact")} == {"pairs", "teacher"}
    assert len(list((disk / "pairs").iterdir())) == 1


def test_a_student_that_began_since_the_list_was_made_keeps_its_store(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate")
    student = lab.only("student", "nfm").path
    shutil.move(student, lab.folder / "later")
    age(root, 8 * DAY)
    found, features = gc.listing([load(ELSEWHERE)], WEEK).going, lab.name("features")
    assert lab.name("pairs") in names(found, "artifact")
    shutil.move(lab.folder / "later", student)
    said: list[str] = []
    gone = gc.remove(found, WEEK, said.append)
    assert names(gone, "artifact") == {features}
    assert any(f"student/{student.name} was made from it" in text for text in said)
    check(root)


def test_what_changed_lately_stays_and_keeps_what_it_was_made_from(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    store = lab.only("pairs")
    os.utime(sorted(store.path.glob("commits/*.json"))[0], (time.time() - 6 * DAY,) * 2)
    collect()
    assert {name.split("/")[0] for name in left_in(root)} == {"data", "teacher", "pairs"}
    assert len(lab.all("pairs")) == 1
    check(root)


def test_a_store_that_is_written_to_without_a_lock_stays_at_any_age_asked_for(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    leave_attempt(lab.only("pairs").path, 60)  # a Slurm task on the next draw
    collect(older_than=0)
    assert len(lab.all("pairs")) == 1


def test_an_artifact_that_is_in_use_is_kept(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    left = leave_attempt(lab.only("pairs").path, 2 * HOUR)
    listed = gc.listing([load(ELSEWHERE)], 0)
    with Lock(lab.only("teacher").path), Lock(lab.only("pairs").path):
        assert (lab.name("pairs"), "somebody works on it") in gc.listing([load(ELSEWHERE)], 0).staying
        gone = gc.remove(listed.going, 0, lambda text: None)  # taken in hand after the list was made
    assert {name.split("/")[0] for name in left_in(root)} == {"data", "teacher", "pairs"}
    assert len(names(gone, "artifact")) == 2
    assert all(path.exists() for path in left)


def test_the_lock_of_a_dead_holder_keeps_nothing(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    in_child(lambda: Lock(lab.only("teacher").path).__enter__())
    assert list(root.glob("teacher/*/lock.json"))
    collect()
    assert left_in(root) == set()


def test_a_damaged_artifact_is_listed_and_stays_with_what_it_was_made_from(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    store = lab.only("pairs").path
    (store / "spec.json").write_bytes(b"{")
    found = gc.listing([load(ELSEWHERE)], 0)
    assert [name for name, _ in found.staying] == [f"pairs/{store.name}"]
    (store / "manifest.g0001.json").write_bytes(b"{")  # now nobody can tell what it was made from: anything may be
    assert names(gc.listing([load(ELSEWHERE)], 0).going, "artifact") == set()
    told = lab.nfm("gc", "-c", ELSEWHERE, "--yes", "--older-than", "0").stdout
    assert "damaged" in told
    assert "nothing to remove" in told


def test_finished_stores_go_only_where_the_configs_in_use_are_named(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    lab.nfm("gc", "--yes")
    assert {name.split("/")[0] for name in left_in(root)} == {"data", "teacher", "pairs"}
    lab.nfm("gc", "-c", ELSEWHERE, "--yes")
    assert left_in(root) == set()


def test_what_was_written_to_within_the_hour_stays_and_is_told(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    store = lab.only("pairs")
    age(root, 8 * DAY)
    for path in store.path.glob("manifest*"):
        path.unlink()
    next((store.path / "commits").rglob("*.json")).touch()  # its writer may have been killed, or may be at work
    told = lab.nfm("gc", "-c", ELSEWHERE, "--yes", "--older-than", "0").stdout
    assert f"{store.name}  (written to within the hour: it may be in the making, and goes an hour after" in told
    assert store.started


def test_a_store_that_a_queued_array_is_to_complete_stays_with_its_teacher(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    store = lab.only("pairs")
    for path in store.path.glob("manifest*"):
        path.unlink()
    (root / "submissions/abc-001").mkdir(parents=True)
    lab.nfm("pairs", "worklist", "-c", "tiny.toml", "--set", "pairs.draws=3", "-o",
            root / "submissions/abc-001/worklist.json")  # fmt: skip
    age(root, 8 * DAY)
    kept = {lab.name("pairs"), lab.name("teacher"), lab.name("data")}
    told = lab.nfm("gc", "-c", ELSEWHERE, "--yes").stdout
    assert kept <= left_in(root)
    assert "submissions" not in told
    (root / "submissions/abc-001/worklist.json").unlink()
    lab.nfm("gc", "--yes")  # no config is named: whose store this is cannot be told
    assert kept <= left_in(root)
    lab.nfm("gc", "-c", ELSEWHERE, "--yes")
    assert left_in(root) == set()


def test_pairs_of_a_configs_data_and_teacher_stay_whatever_they_were_overridden_with(lab: Lab, root: Path) -> None:
    lab.nfm(*lab.arguments("pairs", "pairs.seed=5"))
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    collect(older_than=0, configs=(lab.config,))
    assert len([name for name in left_in(root) if name.startswith("pairs/")]) == 3


def test_a_store_that_somebody_else_made_is_not_garbage(lab: Lab, root: Path) -> None:
    target = root / "pairs" / "exported"
    export.run(lab.only("pairs").path, str(target), "samples", None, None, lambda *_: None)
    age(root, 8 * DAY)
    collect(older_than=0)
    assert Artifact(target).started


def test_nothing_is_removed_unasked(lab: Lab, root: Path) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    before = lab.committed()
    told = CliRunner().invoke(
        cli, ["gc", "-c", str(ELSEWHERE)], catch_exceptions=False
    )  # its standard input is no terminal
    assert told.exit_code == 2
    assert "add --yes, or --dry-run to look" in told.output
    assert lab.committed() == before
    told = CliRunner().invoke(cli, ["gc", "-c", str(ELSEWHERE), "--yes"], catch_exceptions=False)
    assert told.output.splitlines()[-1].startswith("removed 5 artifacts: ")
    assert list(root.glob("[a-z]*/*")) == []
    told = CliRunner().invoke(cli, ["gc", "-c", str(ELSEWHERE), "--yes"], catch_exceptions=False)
    assert told.output == f"nothing to remove under {root}; what was written to within the hour stays\n"


@pytest.mark.parametrize(("answer", "goes"), [(b"n\n", False), (b"y\n", True)])
def test_on_a_terminal_the_user_is_asked(lab: Lab, root: Path, answer: bytes, goes: bool) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 8 * DAY)
    before = lab.committed()
    keyboard, slave = pty.openpty()
    os.write(keyboard, answer)
    command = [sys.executable, "-m", "nfm.pipeline.cli", "gc", "-c", str(ELSEWHERE)]
    done = subprocess.run(command, stdin=slave, capture_output=True, text=True, timeout=PATIENCE)
    os.close(slave)
    os.close(keyboard)
    assert "remove 5 artifacts: " in done.stderr
    assert done.returncode == (0 if goes else 130)
    assert lab.committed() == ({} if goes else before)


@pytest.mark.parametrize("removals", [7, 17])
def test_a_gc_killed_again_and_again_leaves_no_artifact_that_claims_what_it_lacks(
    lab: Lab, root: Path, removals: int
) -> None:
    lab.drop("report", "evaluate", "student")
    age(root, 2 * HOUR)
    leave_attempt(lab.only("pairs").path, 2 * HOUR)
    before, kills, unfinished = len(done_in(root)), 0, 0
    while not (lab.folder / "ended").exists():
        killed_after(removals, lab.folder)
        kills += 1
        check(root)
        for name in left_in(root) - {artifact.name for artifact in done_in(root)}:
            assert not list((root / name).glob("manifest*"))
            unfinished += 1
        assert kills < 200
    assert kills > 200 / removals / 2
    assert unfinished >= before / 2  # an artifact of few files may go whole between two kills
    assert left_in(root) == set()
    age(root, 2 * HOUR)
    collect(older_than=0)  # empty folders, of kills between the last two removals
    assert list(root.glob("[a-z]*/*")) == []
    assert collect(older_than=0) == []


def test_the_root_is_the_only_place_that_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NFM_ARTIFACTS", str(tmp_path / "none"))
    assert not artifacts_root().exists()
    assert gc.listing([load(ELSEWHERE)], 0) == gc.Listing()
