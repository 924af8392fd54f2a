"""A reader that is killed many times yields the same sequence as one that was never killed: a small run of the
benchmark.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import kill_reader
from tests.clusters.distributed import processes
from tests.support.sizes import sized

KILLS = sized(2, 5)


def kill(*arguments: str) -> None:
    """The benchmark's command, in a process of its own."""
    kill_reader.main(arguments, standalone_mode=False)


def test_kills_lose_no_record_and_yield_none_twice(tmp_path: Path) -> None:
    processes.run(kill, tmp_path, {"kill_reader": ("--kills", str(KILLS), "-o", str(tmp_path / "found.json"))})
    found = json.loads((tmp_path / "found.json").read_text())
    for order in ("full", "windowed"):
        assert found["by_order"][order]["kills"] == KILLS
        assert sum(found["by_order"][order]["batches_by_world_size"].values()) == found["by_order"][order]["batches"]
    assert (found["records_lost"], found["records_twice"], found["sequences_equal"]) == (0, 0, True)


def test_the_comparison_finds_a_lost_and_a_repeated_batch(tmp_path: Path) -> None:
    plan = kill_reader.Plan(kill_reader.make_store(tmp_path / "store"), 1, "full")
    whole = [{**line, "world_size": 1} for line in kill_reader.uninterrupted(plan)]
    assert kill_reader.compare(plan, whole)["sequences_equal"]
    wrong = kill_reader.compare(plan, [*whole[:3], whole[4], *whole[4:]])
    assert (wrong["records_lost"], wrong["records_twice"], wrong["sequences_equal"]) == (128, 128, False)
    other = kill_reader.compare(plan, [whole[1], whole[0], *whole[2:]])
    assert (other["records_lost"], other["records_twice"], other["sequences_equal"]) == (0, 0, False)
