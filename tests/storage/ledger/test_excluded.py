"""A generation may lack shards: it says which and why, and everything else of it is read as ever."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage import Mixture, PairStore, StateMismatch
from nfm.storage.errors import MissingShard, StorageError
from nfm.storage.export import export
from nfm.storage.files import atomic
from nfm.storage.format.order import order_key
from nfm.storage.format.spec import StoreSpec, read_spec
from nfm.storage.ledger import commits, seal, shard_list
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import LEVELS, orphans, verify

HOLES = {"d000-s00001": "out of\n  memory", "d001-s00002": "killed five times"}
THERE = {0: [*range(20), *range(40, 50)], 1: list(range(40))}


@pytest.fixture(params=["inline", "listed"])
def root(request: pytest.FixtureRequest, make_store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two draws of 50 slots in shards of 20; the second shard of draw 0 and the last one of draw 1 are missing."""
    if request.param == "listed":
        monkeypatch.setattr(shard_list, "INLINE", 0)
    root = make_store(draws=2, sealed=False)
    for name in HOLES:
        remove(root, name)
    seal.seal(root, 2, HOLES)
    return root


def remove(root: Path, name: str) -> None:
    for path in [*root.glob(f"*/{name}.*")]:
        path.unlink()


def mend(root: Path, spec: StoreSpec, records: Any, name: str) -> None:
    draw, shard = int(name[1:4]), int(name[6:])
    commits.publish(root, write_shard(root, spec, draw, shard, "again", records(spec, draw, shard)))


def slots(store: PairStore | Mixture, epochs: int = 2, world_size: int = 1, state: Any = None, **how: Any) -> list[Any]:
    """(epoch, slots) of every global batch; the noise of each record is that of its draw and slot."""
    readers = [
        store.batches(4, seed=1, epochs=epochs, last="keep", rank=rank, world_size=world_size, **how)
        for rank in range(world_size)
    ]
    for reader in readers if state else ():
        reader.load_state_dict(state)
    found = []
    for parts in zip(*readers):
        for part in parts:
            for draw, slot, noise in zip(part.draw.tolist(), part.slot.tolist(), part.noise):
                expected = np.random.default_rng((draw, slot)).normal(size=noise.shape)
                np.testing.assert_allclose(noise, expected, atol=2e-3)
        found.append((parts[0].epoch, [slot for part in parts for slot in part.slot.tolist()]))
    return found


def test_the_manifest_says_what_is_not_there_and_counts_what_is(root: Path, small_spec: StoreSpec) -> None:
    body = seal.load(root, 1).body
    assert body["records"] == 70
    assert body["excluded"] == [
        {"name": "d000-s00001", "slots": [20, 40], "records": 20, "reason": "out of memory"},
        {"name": "d001-s00002", "slots": [40, 50], "records": 10, "reason": "killed five times"},
    ]
    assert body["order_key"] != order_key(small_spec.source, 50, 2)
    assert body["order_key"] == order_key(small_spec.source, 50, 2, [(0, 20, 40), (1, 40, 50)])


@pytest.mark.parametrize("how", [{}, {"shuffle": "windowed", "window": 1}, {"shuffle": None}])
def test_an_epoch_reads_every_record_that_is_there_once(root: Path, how: dict[str, Any]) -> None:
    store = PairStore.open(root)
    found = slots(store, **how)
    for epoch, there in THERE.items():
        assert sorted(slot for number, batch in found if number == epoch for slot in batch) == there
    assert slots(pickle.loads(pickle.dumps(store)), **how) == found


def test_a_filter_chooses_among_what_is_there(root: Path) -> None:
    found = slots(PairStore.open(root), filter=[("label", "in", [1, 2])])
    for epoch, there in THERE.items():
        chosen = [slot for slot in there if slot % 10 in (1, 2)]
        assert sorted(slot for number, batch in found if number == epoch for slot in batch) == chosen


@pytest.mark.parametrize("how", [{}, {"shuffle": "windowed", "window": 2}])
def test_a_reader_is_resumed_exactly_at_any_world_size(root: Path, how: dict[str, Any]) -> None:
    store = PairStore.open(root)
    whole = slots(store, **how)
    reader = store.batches(4, seed=1, epochs=2, last="keep", **how)
    for _ in range(9):  # into the second epoch
        next(reader)
    rest = slots(store, world_size=2, state=reader.state_dict(), **how)
    reader.close()
    assert [(epoch, sorted(batch)) for epoch, batch in rest] == [(e, sorted(batch)) for e, batch in whole[9:]]


def test_a_mixture_of_stores_that_lack_the_same_is_aligned_and_of_others_is_refused(
    root: Path, make_store, small_spec: StoreSpec
) -> None:
    lacking, complete = PairStore.open(root), PairStore.open(make_store(draws=2, name="complete"))
    alone = [(epoch, sorted(batch)) for epoch, batch in slots(lacking)]
    aligned = slots(Mixture([(lacking, 0.5), (lacking, 0.5)]))
    assert [(epoch, sorted(batch)) for epoch, batch in aligned] == alone
    with pytest.raises(StorageError, match=r"2 shards excluded.*not have every image once an epoch"):
        Mixture([(lacking, 0.5), (complete, 0.5)])


def test_what_is_excluded_cannot_be_gathered_and_the_error_says_why(root: Path) -> None:
    store = PairStore.open(root)
    assert len(store) == 50
    assert [store.slots(draw).tolist() for draw in (0, 1)] == [THERE[0], THERE[1]]
    assert store.gather(0, store.slots(0)[-3:])["slot"].tolist() == [47, 48, 49]
    with pytest.raises(MissingShard, match=r"slots 20 to 39 are excluded .*1 \(out of memory\).*that made it"):
        store.gather(0, np.array([19, 20]))
    with pytest.raises(MissingShard, match="killed five times"):
        store.shard(1, 2)
    assert store.index(draw=1)["slot"].to_pylist() == THERE[1]
    assert len(store.index()) == 70


def test_verification_knows_it_at_every_level_and_when_a_shard_was_made_since(
    root: Path, small_spec: StoreSpec, records
) -> None:
    assert [verify(root, level=level) for level in LEVELS] == [[], [], []]
    assert orphans(root) == []
    mend(root, small_spec, records, "d000-s00001")
    assert verify(root, level="default") == []
    assert verify(root, generation=1) == []
    assert orphans(root) == []


def test_a_later_generation_has_all_and_the_earlier_stays_as_it_is(root: Path, small_spec: StoreSpec, records) -> None:
    before, state = seal.manifest_path(root, 1).read_bytes(), PairStore.open(root).batches(4).state_dict()
    alone = slots(PairStore.open(root))
    for name in HOLES:
        mend(root, small_spec, records, name)
    body = seal.seal(root, 2, HOLES).body
    assert (body["generation"], body["records"], "excluded" in body) == (2, 100, False)
    assert body["order_key"] == order_key(small_spec.source, 50, 2)
    assert seal.manifest_path(root, 1).read_bytes() == before
    assert slots(PairStore.open(root, generation=1)) == alone
    assert verify(root, level="default") == []
    with pytest.raises(StateMismatch):
        PairStore.open(root).batches(4).load_state_dict(state)


def test_sealing_the_same_again_is_the_same_generation_whatever_the_reasons(root: Path) -> None:
    assert seal.build(root, read_spec(root), 2, dict.fromkeys(HOLES, "another"))["generation"] == 1
    assert seal.seal(root, 2, HOLES).body["excluded"][0]["reason"] == "out of memory"


def test_only_what_is_named_may_be_missing(make_store) -> None:
    root = make_store(draws=1, sealed=False)
    remove(root, "d000-s00001")
    with pytest.raises(MissingShard, match=r"1 of 3 shards are not committed: d000-s00001"):
        seal.seal(root, 1, {"d000-s00000": "there all the same"})
    for name in ("d000-s00000", "d000-s00002"):
        remove(root, name)
    with pytest.raises(StorageError, match="draw 0 would hold no shard at all"):
        seal.seal(root, 1, dict.fromkeys(seal.names_of(read_spec(root), 1), "gone"))
    assert seal.numbers(root) == []


def test_the_arrays_of_layout_zarr_can_have_no_holes(make_store, spec_of) -> None:
    root = make_store(1, spec_of("zarr"), sealed=False)
    (root / "commits" / "d000-s00001.json").unlink()
    with pytest.raises(StorageError, match=r"d000-s00001.*layout zarr can have no holes"):
        seal.seal(root, 1, {"d000-s00001": "x"})
    assert seal.numbers(root) == []


HOSTILE = [
    None, "x", [], [{}], [7],
    [{"name": "d000-s00001", "slots": [0, 20], "records": 20, "reason": "x"}],
    [{"name": "d000-s00000", "slots": [0, 20], "records": 20, "reason": "x"}],
    [{"name": "../x", "slots": [20, 40], "records": 20, "reason": "x"}],
    [{"name": "d000-s00001", "slots": [20, 41], "records": 20, "reason": "x"}],
    [{"name": "d000-s00001", "slots": [20, 40, 60], "records": 20, "reason": "x"}],
    [{"name": "d000-s00001", "slots": "no", "records": 20, "reason": "x"}],
    [{"name": "d000-s00001", "slots": [20, 40], "records": 20, "reason": 7}],
    [{"name": "d009-s00001", "slots": [20, 40], "records": 20, "reason": "x"}],
    [{"name": "d000-s00001", "slots": [20, 40], "records": 20, "reason": "x"}] * 2,
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_list_of_what_is_excluded_is_refused(make_store, value: Any) -> None:
    root = make_store(draws=1, sealed=False)
    remove(root, "d000-s00001")
    seal.seal(root, 1, HOLES)
    path = seal.manifest_path(root, 1)
    atomic.write_json(path, atomic.read_json(path) | {"excluded": value})
    with pytest.raises(StorageError):
        PairStore.open(root)
    assert verify(root)


def test_an_export_lacks_the_same_and_zarr_refuses_before_anything_is_converted(root: Path, tmp_path: Path) -> None:
    store = PairStore.open(root)
    exported = export(store, tmp_path / "samples", layout="samples")
    assert exported.body["excluded"] == [*store.excluded]
    found = PairStore.open(tmp_path / "samples")
    for draw, there in THERE.items():
        np.testing.assert_array_equal(found.slots(draw), there)
    assert verify(tmp_path / "samples", level="default") == []
    with pytest.raises(StorageError, match="can have no holes; complete the store first"):
        export(store, tmp_path / "zarr", layout="zarr")
    assert not (tmp_path / "zarr").exists()
