"""The whole life of a store on an object store, in front of a server that fails, truncates and delays."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage import PairStore
from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files.copies.cache import ShardCache
from nfm.storage.files.paths import as_path, names_in, remove, size_of
from nfm.storage.format.spec import StoreSpec, write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.commits import Commit
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import verify
from tests.support.buckets.s3server import S3, new_clients

OTHERS = (("gs", "blocks"), ("az", "samples"))
LAYOUTS = [
    ("s3", "blocks"),
    ("s3", "samples"),
    ("s3", "zarr"),
    *(pytest.param(*other, marks=pytest.mark.long) for other in OTHERS),
]
FIELDS = ("image", "noise", "label", "slot", "draw")


def spec_of(small: StoreSpec, layout: str) -> StoreSpec:
    """The small spec in another layout, in two shards a draw; Zarr wants shards of whole blocks."""
    return dataclasses.replace(small, layout=layout, rows_per_shard=32, rows_per_block=4)


def fill(root: str | Path, spec: StoreSpec, records: Any, draws: range) -> None:
    """Writes and commits all shards of these draws."""
    for draw in draws:
        for shard in range(spec.shards_per_draw):
            written = write_shard(root, spec, draw, shard, "a1", records(spec, draw, shard))
            commits.publish(root, written)


def make(root: str | Path, spec: StoreSpec, records: Any, draws: int = 2) -> str | Path:
    """A sealed store, made through the public functions."""
    write_spec(root, spec)
    fill(root, spec, records, range(draws))
    seal.seal(root, draws)
    return root


def read(store: PairStore, **how: Any) -> list[dict[str, np.ndarray]]:
    """The batches of two epochs, copied."""
    batches = store.batches(7, seed=3, epochs=2, **how)
    return [{name: np.array(getattr(batch, name)) for name in FIELDS} for batch in batches]


def same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> bool:
    return len(one) == len(other) > 0 and all(
        np.array_equal(a[name], b[name]) for a, b in zip(one, other) for name in FIELDS
    )


@pytest.mark.seconds(30)
@pytest.mark.parametrize(("s3", "layout"), LAYOUTS, indirect=["s3"])
def test_a_store_lives_on_an_object_store_as_it_does_here(
    layout: str, s3: S3, bucket: str, tmp_path: Path, small_spec: StoreSpec, records: Any
) -> None:
    spec = spec_of(small_spec, layout)
    here, there = make(tmp_path / "store", spec, records), make(f"{bucket}/store", spec, records)
    local, remote = PairStore.open(here), PairStore.open(there)
    assert remote.content_digest == local.content_digest
    assert remote.order_key == local.order_key
    for how in (
        {},
        {"shuffle": "windowed", "window": 2},
        {"shuffle": None},
        {"filter": [("label", "in", [1, 2, 3])]},
        {"last": "keep", "filter": [("draw", "==", 1)]},
    ):
        assert same(read(local, **how), read(remote, **how)), how
    assert remote.index().equals(local.index())

    reader = remote.batches(7, seed=3, epochs=2)
    seen = [np.array(next(reader).slot) for _ in range(4)]
    state = reader.state_dict()
    reader.close()
    again = PairStore.open(there).batches(7, seed=3, epochs=2)
    again.load_state_dict(state)
    seen += [np.array(batch.slot) for batch in again]
    assert np.array_equal(seen, [batch["slot"] for batch in read(local)])

    fill(there, spec, records, range(2, 3))
    seal.seal(there, 3)
    grown = PairStore.open(there)
    assert (grown.generation, grown.draws, PairStore.open(there, generation=1).draws) == (2, 3, 2)
    assert PairStore.open(f"{there}/manifest.g0001.json").generation == 1
    for level in ("quick", "default"):
        assert verify(there, level=level) == []


def test_of_two_writers_of_a_shard_on_s3_one_is_committed(bucket: str, small_spec: StoreSpec, records: Any) -> None:
    root, stood, barrier = f"{bucket}/store", {}, threading.Barrier(4)
    write_spec(root, small_spec)

    def write(attempt: str) -> None:
        written = write_shard(root, small_spec, 0, 0, attempt, records(small_spec, 0, 0))
        barrier.wait()
        stood[attempt] = commits.publish(root, written)

    threads = [threading.Thread(target=write, args=(f"a{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stood) == 4
    winner = commits.read(root, "d000-s00000")
    assert winner is not None
    assert {commit.attempt for commit in stood.values()} == {winner.attempt}
    assert names_in(as_path(root) / "shards") == [f"d000-s00000.{winner.attempt}.tar"]
    assert names_in(as_path(root) / "index") == [f"d000-s00000.{winner.attempt}.parquet"]


def test_two_processes_that_seal_at_once_agree(bucket: str, small_spec: StoreSpec, records: Any) -> None:
    root, sealed = f"{bucket}/store", []
    write_spec(root, small_spec)
    fill(root, small_spec, records, range(1))
    threads = [threading.Thread(target=lambda: sealed.append(seal.seal(root, 1))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sealed) == 2
    assert [one.body for one in sealed] == [seal.load(root, 1).body] * 2
    assert seal.numbers(root) == [1]


def test_other_file_systems_hold_a_store_too(tmp_path: Path, small_spec: StoreSpec, records: Any) -> None:
    here = read(PairStore.open(make(tmp_path / "here", small_spec, records)))
    for root in (f"memory://{tmp_path.name}/store", f"file://{tmp_path}/there"):
        assert same(here, read(PairStore.open(make(root, small_spec, records))))
    assert same(here, read(PairStore.open(tmp_path / "there")))


@pytest.fixture
def stored(
    s3: S3, tmp_path_factory: pytest.TempPathFactory, small_spec: StoreSpec, records: Any
) -> tuple[str, list[dict[str, np.ndarray]]]:
    """(a store of 20 shards on S3, which tests only read; the batches that it must yield in windowed order)."""
    if not _stored:
        import fsspec

        spec = dataclasses.replace(small_spec, rows_per_shard=5, rows_per_block=5)
        made = Path(make(tmp_path_factory.mktemp("stored"), spec, records))
        fsspec.filesystem(s3.scheme, use_listings_cache=False).mkdir("stored")
        upload(made, f"{s3.scheme}://stored/store")
        _stored.append((f"{s3.scheme}://stored/store", read(PairStore.open(made), shuffle="windowed", window=2)))
    s3.requests.clear()
    return _stored[0]


_stored: list[tuple[str, list[dict[str, np.ndarray]]]] = []


def upload(folder: Path, root: str) -> None:
    """Copies a store, as any tool for object stores does."""
    as_path(root).fs.put(str(folder), as_path(root).path, recursive=True)  # type: ignore[attr-defined]


def disk_use(folder: Path, sizes: dict[str, int]) -> int:
    """Bytes that a cache holds on the disk: its files, and those without a name that this process has mapped.

    `sizes` are those of the files by name: a map states whole pages only.
    """
    files = sum(size_of(path) or 0 for path in folder.iterdir() if not path.name.startswith(".tmp-"))
    gone = {}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if str(folder) in line and line.endswith("(deleted)"):
            _, _, _, _, inode, path, _ = line.split()
            gone[inode] = sizes[Path(path).name]
    return files + sum(gone.values())


def test_a_store_larger_than_the_cache_streams_within_its_bound(
    stored: tuple[str, list[dict[str, np.ndarray]]], tmp_path: Path
) -> None:
    root, expected = stored
    store = PairStore.open(root)
    sizes = {entry.payload.sha256: entry.payload.bytes for entry in store.sealed.shards}
    most = max(sizes.values())
    cache = ShardCache(tmp_path / "bounded", 5 * most)
    store, found, used, named = PairStore.open(root, cache=cache), [], [], []
    for batch in store.batches(7, seed=3, epochs=2, shuffle="windowed", window=2):
        found.append({name: np.array(getattr(batch, name)) for name in FIELDS})
        used.append(disk_use(tmp_path / "bounded", sizes))
        named.append(sum(size_of(path) or 0 for path in (tmp_path / "bounded").iterdir()))
    assert same(found, expected)
    assert cache.evictions > 0
    assert max(named) <= 5 * most
    assert max(used) <= 2 * 5 * most  # what is evicted while a batch is made of it keeps its room that long
    with pytest.raises(StorageError, match="windowed"):
        next(PairStore.open(root, cache=cache).batches(7))


def read_in_child(root: str, folder: Path, answers: Any) -> None:
    answers.put(read(PairStore.open(root, cache=ShardCache(folder)), shuffle="windowed", window=2))


def test_two_processes_read_through_one_folder(stored: tuple[str, list[dict[str, np.ndarray]]], tmp_path: Path) -> None:
    root, expected = stored
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    children = [context.Process(target=read_in_child, args=(root, tmp_path / "shared", answers)) for _ in range(2)]
    for child in children:
        child.start()
    found = [answers.get() for _ in children]
    for child in children:
        child.join()
    assert all(same(one, expected) for one in found)
    assert len(names_in(tmp_path / "shared")) == len(PairStore.open(root).sealed.shards)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("error", {"status": 503}),
        ("error", {"status": 500, "code": "InternalError"}),
        ("reset", {}),
        ("cut", {}),
        ("shrink", {}),
        ("flip", {}),
        ("delay", {"seconds": 0.1}),
    ],
)
def test_a_server_with_bad_moments_yields_the_right_batches(
    kind: str, how: dict[str, Any], s3: S3, stored: tuple[str, list[dict[str, np.ndarray]]]
) -> None:
    root, expected = stored
    for where in ("spec.json", "manifest", "d000-s00000", "d001-s00003", "d000-s00009"):
        s3.fail(kind, where, method="GET", times=2, **how)  # type: ignore[arg-type]
    assert same(read(PairStore.open(root), shuffle="windowed", window=2), expected)
    assert kind == "delay" or not any(fault.times for fault in s3.faults)


@pytest.mark.parametrize("kind", ["error", "reset", "cut", "shrink", "flip"])
@pytest.mark.parametrize("where", ["manifest.g0001.json", "d000-s00002.a1.tar"])
def test_a_server_that_stays_bad_ends_in_an_error_that_names_the_file(
    kind: str,
    where: str,
    s3: S3,
    stored: tuple[str, list[dict[str, np.ndarray]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, _ = stored
    monkeypatch.setenv("NFM_PATIENCE", "0.2")
    s3.fail(kind, where, method="GET", times=10_000)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=rf"{root}/.*{where}"):
        read(PairStore.open(root), shuffle="windowed", window=2)


@pytest.mark.seconds(30)
@pytest.mark.parametrize("layout", ["blocks", pytest.param("zarr", marks=pytest.mark.long)])
def test_writing_through_bad_moments_leaves_one_right_store(
    layout: str, s3: S3, bucket: str, tmp_path: Path, small_spec: StoreSpec, records: Any
) -> None:
    spec = spec_of(small_spec, layout)
    payloads = {"blocks": ["d000-s00001.a1.tar"], "zarr": ["d000-s00001.a1/noise", "d000/noise/c/1", "zarr.json"]}
    for kind in ("error", "reset", "lose"):
        for where in ("spec.json", *payloads[layout], "d000-s00001.a1.parquet", "d001-s00000.json", "manifest"):
            s3.fail(kind, where, method="PUT")  # type: ignore[arg-type]
    root = make(f"{bucket}/store", spec, records)
    assert not any(fault.times for fault in s3.faults)
    assert verify(root, level="default") == []
    expected = PairStore.open(make(tmp_path / "here", spec, records))
    assert same(read(PairStore.open(root)), read(expected))


@pytest.mark.parametrize("kind", ["flip", "shrink", "cut"])
def test_an_index_part_that_arrives_damaged_is_read_again(
    kind: str, s3: S3, stored: tuple[str, list[dict[str, np.ndarray]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")  # as where the store has no checksums
    new_clients()
    store = PairStore.open(stored[0])
    s3.fail(kind, "d001-s00001.a1.parquet", method="GET", times=2)  # type: ignore[arg-type]
    assert store.index(["slot"], draw=1)["slot"].to_pylist() == list(range(50))
    s3.fail(kind, "d001-s00002.a1.parquet", method="GET", times=100)  # type: ignore[arg-type]
    monkeypatch.setenv("NFM_PATIENCE", "0.2")
    with pytest.raises(StorageError, match=r"d001-s00002\.a1\.parquet"):
        store.index(["slot"], draw=1)
    new_clients()


def test_a_shard_that_is_gone_or_another_one_is_named(
    bucket: str, tmp_path: Path, small_spec: StoreSpec, records: Any
) -> None:
    root = f"{bucket}/store"
    upload(Path(make(tmp_path / "made", small_spec, records, 1)), root)
    shards = as_path(root) / "shards"
    (shards / "d000-s00001.a1.tar").write_bytes((shards / "d000-s00000.a1.tar").read_bytes())
    with pytest.raises(CorruptShard, match=r"://.*d000-s00001\.a1\.tar"):
        read(PairStore.open(root), shuffle=None)
    assert [finding.file for finding in verify(root, level="default")] == [f"{root}/shards/d000-s00001.a1.tar"]
    remove(shards / "d000-s00001.a1.tar")
    with pytest.raises(MissingShard, match=r"://.*d000-s00001\.a1\.tar"):
        read(PairStore.open(root), shuffle=None)
    with pytest.raises(StorageError, match=r"://.*nothing"):
        PairStore.open(f"{root}/nothing")


def test_a_commit_on_s3_whose_answer_was_lost_is_our_own(
    s3: S3, bucket: str, small_spec: StoreSpec, records: Any
) -> None:
    root = f"{bucket}/store"
    write_spec(root, small_spec)
    found: list[Commit] = []
    for shard, kind in enumerate(("lose", "error", "reset")):
        written = write_shard(root, small_spec, 0, shard, "a1", records(small_spec, 0, shard))
        s3.fail(kind, f"commits/{written.name}", method="PUT", times=2)  # type: ignore[arg-type]
        found.append(commits.publish(root, written))
    assert [commit.attempt for commit in found] == ["a1"] * 3
    assert list(commits.committed(root, 1)) == [commit.name for commit in found]
