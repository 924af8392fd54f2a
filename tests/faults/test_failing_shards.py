"""A source that cannot be read: its shards are set aside, the rest is made, and after a repair the missing ones are
made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.storage import PairStore
from nfm.storage.files import atomic
from tests.faults.harness import Making, check_whole

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.faults.conftest import Uninterrupted

SOME = [
    "serial",
    pytest.param("ray", marks=pytest.mark.faults),
    pytest.param("slurm", marks=pytest.mark.faults),
]
DRAWS = 2
HALF = 16 * DRAWS  # shards whose images lie in the second of the data's two files
NAMES = frozenset(f"d{draw:03d}-s{shard:05d}" for draw in range(DRAWS) for shard in range(16, 32))


def truncate(lab: Lab) -> Callable[[], object]:
    """Cut off the end of one of the data's files; returns what restores it."""
    path = lab.only("data").path / "train/s00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3000])
    return lambda: path.write_bytes(whole)


def set_aside(store: Path) -> dict[str, str]:
    """The tracebacks, by shard."""
    return {path.stem: path.read_text() for path in (store / "failed").glob("*.txt")}


@pytest.mark.parametrize("executor", SOME, indirect=True)
def test_a_corrupt_source_fails_its_shards_and_they_alone_are_tried_again(
    bare: Lab, executor: str, uninterrupted: Uninterrupted
) -> None:
    making, restore = Making(bare, executor, DRAWS), truncate(bare)
    said = making.resume(exits=1)
    assert "s00001.tar" in said
    assert "Mend the cause" in said or "tries only these again" in said
    tracebacks = set_aside(making.store)
    assert tracebacks.keys() == NAMES
    assert all("s00001.tar" in text and 'File "' in text for text in tracebacks.values())
    assert making.committed() == making.shards - HALF
    assert not list(making.store.glob("manifest*"))
    made = commits_of(making)
    restore()
    said = making.resume()
    if executor != "slurm":  # a new list has only what is pending
        assert f"{HALF} of {2 * HALF} shards are committed already" in said
    assert made.items() <= commits_of(making).items()
    assert not set_aside(making.store)
    check_whole(making, uninterrupted(DRAWS))


def complete(making: Making, sealing: bool = False) -> None:
    """Run the same command again; without a process of its own where no other processes are at work."""
    if making.executor == "serial" or (making.executor == "slurm" and sealing):
        making.seal()
    else:
        making.resume()


def commits_of(making: Making) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (making.store / "commits").glob("d*.json")}


@pytest.mark.parametrize("executor", SOME, indirect=True)
def test_a_generation_may_lack_what_fails_and_a_later_one_completes_it(
    bare: Lab, executor: str, uninterrupted: Uninterrupted
) -> None:
    making, restore = Making(bare, executor, DRAWS), truncate(bare)
    lacking = making.by(executor, sets=("pairs.max_missing=256",))
    if executor == "slurm":
        for process in lacking.start():
            bare.wait(process, exits=1)
    complete(lacking, sealing=True)
    manifest = atomic.read_json(making.store / "manifest.g0001.json")
    assert {entry["name"] for entry in manifest["excluded"]} == NAMES
    assert all("s00001.tar" in entry["reason"] for entry in manifest["excluded"])
    assert manifest["records"] == 256
    restore()
    check_whole(lacking, None, lacking=NAMES)
    rest = PairStore.open(making.store, generation=1)
    slots = [int(slot) for batch in rest.batches(32, epochs=DRAWS) for slot in batch.slot]
    assert sorted(slots) == sorted(list(range(128)) * DRAWS)

    complete(making)
    assert atomic.read_json(making.store / "manifest.g0002.json")["records"] == 512
    assert atomic.read_json(making.store / "manifest.g0001.json") == manifest
    check_whole(making, uninterrupted(DRAWS))
