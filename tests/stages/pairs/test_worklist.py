"""A worklist gives every shard to exactly one task, and its tasks together make what a serial run makes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfm.stages.executors import slurm
from nfm.storage import PairStore
from nfm.storage.errors import WrongUse
from nfm.storage.files import atomic
from nfm.storage.format.spec import shard_name
from tests.e2e.conftest import command

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.e2e.conftest import Nfm

SMALL = [
    part for text in ("rows_per_shard=8", "rows_per_block=8", "batch_size=8") for part in ("--set", f"pairs.{text}")
]
LIST = ("pairs", "worklist", "-c", "tiny.toml", "-o", "list.json")
ALL = 2 * 32  # small shards


@pytest.fixture
def nfm(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Nfm:
    """The command in this process, on a copy of the tiny run."""
    return command(lab, monkeypatch)


def small_store(lab: Lab) -> Path:
    return next(store.path for store in lab.all("pairs") if store.spec["store"]["rows_per_shard"] == 8)


@given(st.integers(0, 300), st.integers(1, 400))
def test_every_shard_falls_to_exactly_one_task(shards: int, of: int) -> None:
    names = [shard_name(0, number) for number in range(shards)]
    shares = [slurm.share(names, task, of) for task in range(of)]
    assert sorted(name for share in shares for name in share) == names
    assert all(names[number] in shares[number % of] for number in range(shards))


def test_tasks_make_the_store_that_a_serial_run_makes(lab: Lab, nfm: Nfm, made: Lab) -> None:
    lab.drop("pairs")
    assert "8 shards" in nfm(*LIST)
    store = lab.only("pairs").path
    tasks = [lab.start("pairs", "encode", "list.json", "--task", task, "--of", 3) for task in range(3)]
    for task in tasks:
        lab.wait(task)
    assert not list(store.glob("manifest*"))
    assert not (store / "lock.json").exists()
    lines = [line for path in store.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    names = [line.split('"shard": "')[1].split('"')[0] for line in lines if '"kind": "COMMIT"' in line]
    assert sorted(names) == [shard_name(draw, shard) for draw in range(2) for shard in range(4)]

    nfm("run", "pairs", "-c", "tiny.toml", "--set", "pairs.executor=slurm")
    assert PairStore.open(store).content_digest == PairStore.open(made.only("pairs").path).content_digest


def test_a_stopped_task_exits_130_and_the_same_command_makes_only_the_rest(lab: Lab, nfm: Nfm) -> None:
    nfm(*LIST, *SMALL)
    store, task = small_store(lab), ("pairs", "encode", "list.json", "--task", "0", "--of", "1")

    def commits() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in store.glob("commits/d*.json")}

    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = len(commits())
        process = lab.start(*task)
        lab.until(lambda before=before: len(commits()) > before, process)
        process.send_signal(number)
        assert "the same task goes on from here" in lab.wait(process, exits=130).stderr
        assert before < len(commits()) < ALL
    kept = commits()
    assert f"{ALL} shards are this task's, {len(kept)} of them committed already" in nfm(*task)
    assert len(commits()) == ALL
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_list_stays_as_it_is_and_one_that_does_not_serve_is_refused(lab: Lab, nfm: Nfm) -> None:
    nfm(*LIST, *SMALL)
    before = (lab.folder / "list.json").read_bytes()
    nfm("pairs", "encode", "list.json", "--task", 0, "--of", 40)
    assert f"{ALL} shards" in nfm(*LIST, *SMALL)  # a planning job that was requeued: tasks may have begun by it
    assert "lacks 32 shards that are pending now" in nfm(*LIST, *SMALL, "--set", "pairs.draws=3", exits=2)
    assert "is the list of" in nfm(*LIST, *SMALL, "--set", "pairs.seed=5", exits=2)
    assert (lab.folder / "list.json").read_bytes() == before


def test_a_finished_store_has_an_empty_list_and_its_tasks_nothing_to_do(lab: Lab, nfm: Nfm) -> None:
    before = lab.committed()
    assert "0 shards" in nfm(*LIST)
    assert "0 shards are this task's" in nfm("pairs", "encode", "list.json", "--task", 0, "--of", 2)
    assert lab.committed() == before


def test_a_damaged_list_a_lost_store_and_a_task_too_many_are_named(lab: Lab, nfm: Nfm) -> None:
    nfm(*LIST, *SMALL)
    file, store = lab.folder / "list.json", small_store(lab)
    assert "tasks count from 0 to 2" in nfm("pairs", "encode", "list.json", "--task", 3, "--of", 3, exits=2)
    store.rename(store.with_name("elsewhere"))
    assert str(store) in nfm("pairs", "encode", "list.json", "--task", 0, "--of", 1, exits=1)
    file.write_text(file.read_text().replace("s00001", "s00002", 1))
    with pytest.raises(atomic.StorageError, match=r"list\.json"):
        slurm.load(file)


@pytest.mark.parametrize("text", ["[data]\nsource = 1\n", "{}", "[1]", '{"schema": "x"}', "", "\xff"])
def test_a_file_that_is_no_list_is_wrong_use_and_says_what_makes_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "w.toml").write_text(text, "latin-1")
    with pytest.raises(WrongUse, match=r"w\.toml: no worklist; give the file that `nfm worklist "):
        slurm.load(tmp_path / "w.toml")


def test_a_shard_that_fails_is_set_aside_and_the_task_makes_the_others(lab: Lab, nfm: Nfm) -> None:
    nfm(*LIST, *SMALL)
    store = small_store(lab)
    name = shard_name(0, 3)
    in_the_way = store / "commits" / f"{name}.json"
    in_the_way.parent.mkdir()
    in_the_way.symlink_to("nowhere")  # no commit can be created there
    said = nfm("pairs", "encode", "list.json", "--task", "0", "--of", "1", exits=1)
    assert name in said
    assert (store / "failed" / f"{name}.txt").exists()
    assert len([path for path in store.glob("commits/d*.json") if path.is_file()]) == ALL - 1
    in_the_way.unlink()
    nfm("pairs", "encode", "list.json", "--task", "0", "--of", "1")
    assert not (store / "failed" / f"{name}.txt").exists()
