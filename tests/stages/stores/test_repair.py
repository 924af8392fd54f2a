"""Repair may be killed between any two moves; sealing again takes nothing away."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.stages.stores import repair
from nfm.storage import layouts
from nfm.storage.ledger import seal
from tests.storage.conftest import make_store, small_spec  # noqa: F401  fixtures

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.mark.parametrize("kind", ["blocks", "zarr"])
def test_a_repair_killed_between_any_two_moves_finds_the_shard_again(make_store, small_spec, tmp_path, kind):  # noqa: F811
    spec = replace(small_spec, layout=kind, rows_per_block=10)
    whole = make_store(spec=spec)
    name = "d000-s00001"
    count = len(repair.files_of_shards(whole, [name]))
    for moved in range(count):
        root = shutil.copytree(whole, tmp_path / f"after-{moved}")
        damaged = next(root.glob("d000/noise/c/1/0/0/0" if kind == "zarr" else f"shards/{name}.*"))
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        assert repair.bad_shards(root) == [name]
        for file in repair.files_of_shards(root, [name])[:moved]:
            file.unlink()
        left = [root / path for path in layouts.of(spec).placed(spec, name) if (root / path).exists()]
        committed = (root / "commits" / f"{name}.json").exists()
        assert repair.bad_shards(root) == [name] if committed else not left


def test_sealing_again_never_gives_readers_less_than_they_had(lab: Lab, root: Path) -> None:
    """The newest generation lacks a shard of its second draw: one draw is complete, two are what readers have."""
    store = lab.only("pairs").path
    (store / "manifest.g0001.json").unlink()
    for path in store.glob("*/d001-s00002.*"):
        path.unlink()
    seal.seal(store, 2, {"d001-s00002": "its image is unreadable"})
    assert repair.sealable(store) == (2, {"d001-s00002": "its image is unreadable"})
    before = lab.committed()
    assert seal.seal(store, *repair.sealable(store)).number == 1
    assert lab.committed() == before
