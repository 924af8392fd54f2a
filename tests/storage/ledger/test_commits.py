"""A shard exists exactly when its commit does, and then it is whole: under races, kills and full disks."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nfm.storage.errors import MissingShard, NewerSchema, StorageError
from nfm.storage.files import atomic
from nfm.storage.format.index import INDEX_SCHEMA
from nfm.storage.format.moments import MomentSums, pool
from nfm.storage.format.spec import StoreSpec, write_spec
from nfm.storage.layouts.tar_blocks import MappedShard
from nfm.storage.ledger import commits
from nfm.storage.ledger.shard_writer import write_shard
from tests.support.patience import PATIENCE


def test_a_shard_without_a_commit_does_not_exist(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    written = write_shard(tmp_path, small_spec, 0, 1, "a1", records(small_spec, 0, 1))
    assert written.payload == "shards/d000-s00001.a1.tar"
    assert commits.read(tmp_path, "d000-s00001") is None
    assert commits.committed(tmp_path, 1) == {}
    commits.publish(tmp_path, dataclasses.replace(written, device="cpu", batch_size=8))
    assert list(commits.committed(tmp_path, 1)) == ["d000-s00001"]
    assert commits.committed(tmp_path, 0) == {}


def test_a_commit_reads_back_and_describes_its_files(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    written = write_shard(tmp_path, small_spec, 0, 2, "a1", records(small_spec, 0, 2))
    commit = commits.publish(
        tmp_path, dataclasses.replace(written, versions={"torch": "2"}, precision="bfloat16", threads=2, seconds=1.5)
    )
    assert commits.read(tmp_path, "d000-s00002") == commit
    assert atomic.hash_file(tmp_path / commit.payload) == (commit.payload_sha256, commit.payload_bytes)
    assert atomic.hash_file(tmp_path / commit.index) == (commit.index_sha256, commit.index_bytes)
    assert commit.records == 10
    assert commit.keys_digest == atomic.digest("\n".join(f"d000-{s:09d}" for s in range(40, 50)).encode())


def test_the_index_part_has_a_row_a_record(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    written = write_shard(tmp_path, small_spec, 3, 0, "a1", records(small_spec, 3, 0))
    table = pq.read_table(tmp_path / written.index)
    assert table.schema.equals(INDEX_SCHEMA)
    assert table.num_rows == 20
    row = table.slice(11, 1).to_pylist()[0]
    assert row == {
        "key": "d003-000000011",
        "slot": 11,
        "row": 11,
        "draw": 3,
        "flip": True,
        "label": 1,
        "group": -1,
        "nll": 0.5,
    }


def test_an_nll_that_no_coupling_gave_is_nan_not_null(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    bare = ({k: v for k, v in r.items() if k not in ("nll", "flip", "row")} for r in records(small_spec, 0, 0))
    table = pq.read_table(tmp_path / write_shard(tmp_path, small_spec, 0, 0, "a1", bare).index)
    assert table["nll"].null_count == 0
    assert np.isnan(table["nll"].to_numpy()).all()
    assert table["row"].to_pylist() == list(range(20))


def test_moments_are_those_of_the_noise_as_stored(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    written = write_shard(tmp_path, small_spec, 0, 0, "a1", records(small_spec, 0, 0))
    shard = MappedShard(tmp_path / written.payload, small_spec.fields, 20, small_spec.rows_per_block)
    noise = shard.read("noise", 0, 20).astype(np.float64)
    centred = noise - noise.mean()
    expected = {
        "mean": noise.mean(),
        "var": noise.var(),
        "min": noise.min(),
        "max": noise.max(),
        "skewness": (centred**3).mean() / noise.var() ** 1.5,
        "kurtosis": (centred**4).mean() / noise.var() ** 2,
        "nonfinite": 0,
    }
    assert written.moments == pytest.approx(expected, rel=1e-10)


def test_pooled_moments_are_the_moments_of_the_union() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=1000) * 2 + 1, rng.exponential(size=10), np.full(3, 7.0)]
    parts = []
    for array in arrays:
        sums = MomentSums()
        sums.add(array)
        parts.append((array.size, sums.result()))
    whole = MomentSums()
    whole.add(np.concatenate(arrays))
    assert pool(parts) == pytest.approx(whole.result(), rel=1e-9)


def test_moments_count_what_is_not_finite_and_stay_json() -> None:
    sums = MomentSums()
    sums.add(np.array([np.nan, np.inf]))
    assert sums.result()["nonfinite"] == 2
    atomic.canonical_json(sums.result())
    atomic.canonical_json(pool([(2, sums.result())]))


def test_two_writers_of_one_shard_leave_one_commit(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    write_spec(tmp_path, small_spec)
    returned, barrier = {}, threading.Barrier(4)

    def work(attempt: str) -> None:
        written = write_shard(tmp_path, small_spec, 0, 0, attempt, records(small_spec, 0, 0))
        barrier.wait()
        returned[attempt] = commits.publish(tmp_path, written)

    threads = [threading.Thread(target=work, args=(f"a{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = commits.read(tmp_path, "d000-s00000")
    assert winner is not None
    assert len(returned) == 4
    assert all(commit == winner for commit in returned.values())
    assert [p.name for p in (tmp_path / "shards").iterdir()] == [f"d000-s00000.{winner.attempt}.tar"]
    assert [p.name for p in (tmp_path / "index").iterdir()] == [f"d000-s00000.{winner.attempt}.parquet"]


def test_a_committed_attempt_is_never_written_again(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    written = write_shard(tmp_path, small_spec, 0, 0, "a1", records(small_spec, 0, 0))
    commits.publish(tmp_path, written)
    with pytest.raises(StorageError, match="new attempt"):
        write_shard(tmp_path, small_spec, 0, 0, "a1", records(small_spec, 0, 0))


def _with_noise(records, value: float):
    for chunk in records:
        chunk["noise"][-1, 0, 0, 0] = value
        yield chunk


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: _with_noise(r, np.nan), "not finite.*check what made them"),
        (lambda r: _with_noise(r, 1e5), "not finite.*codec float32"),
        (lambda r: list(r)[:-1], "14 records, 20 were announced"),
        (lambda r: reversed(list(r)), "slots"),
        (lambda r: ({k: v for k, v in c.items() if k != "label"} for c in r), "lack label"),
        (lambda r: (c | {"flip": c["flip"][:1]} for c in r), "'flip'"),
    ],
)
def test_wrong_records_make_no_shard_and_leave_nothing(
    tmp_path: Path, small_spec: StoreSpec, records, change, said: str
) -> None:
    with pytest.raises(StorageError, match=said):
        write_shard(tmp_path, small_spec, 0, 0, "a1", change(records(small_spec, 0, 0)))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_attempt_that_is_no_file_name_is_refused(tmp_path: Path, small_spec: StoreSpec) -> None:
    for attempt in ("", "a/b", "a.b"):
        with pytest.raises(StorageError, match="attempt"):
            write_shard(tmp_path, small_spec, 0, 0, attempt, [])


def test_a_commit_without_its_shard_is_not_published(tmp_path: Path, small_spec: StoreSpec, records) -> None:
    written = write_shard(tmp_path, small_spec, 0, 0, "a1", records(small_spec, 0, 0))
    (tmp_path / written.payload).unlink()
    with pytest.raises(MissingShard, match=r"d000-s00000\.a1\.tar"):
        commits.publish(tmp_path, written)
    assert commits.committed(tmp_path, 1) == {}


def test_damaged_foreign_and_newer_commits_are_refused_by_name(make_store) -> None:
    root = make_store()
    path = commits.commit_path(root, "d000-s00001")
    body = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"a1"', '"a2"'))
    with pytest.raises(StorageError, match=r"d000-s00001\.json.*digest"):
        commits.committed(root, 2)
    atomic.write_json(path, body | {"format": 2})
    with pytest.raises(NewerSchema, match=r"d000-s00001\.json"):
        commits.read(root, "d000-s00001")
    atomic.write_json(path, body | {"name": "d000-s00000"})
    with pytest.raises(StorageError, match="is the commit of d000-s00000"):
        commits.read(root, "d000-s00001")
    atomic.write_json(path, {"name": "d000-s00001"})
    with pytest.raises(StorageError, match="no complete commit"):
        commits.read(root, "d000-s00001")


HOSTILE = [None, True, -1, 1.5, 2**70, "", "x", "/etc/passwd", "shards/../../x.tar", [], {}, [{}], {"a": []}]


@pytest.mark.parametrize("layout", ["blocks", "zarr"])
def test_a_hostile_commit_is_a_storage_error_and_its_paths_are_not_followed(
    tmp_path: Path, spec_of, records, layout
) -> None:
    spec = spec_of(layout)
    commits.publish(tmp_path, write_shard(tmp_path, spec, 0, 0, "a1", records(spec, 0, 0)))
    body = json.loads(commits.commit_path(tmp_path, "d000-s00000").read_text())
    del body["digest"]
    changes = [{key: value} for key in body for value in HOSTILE]
    changes += [{"payload": f"shards/d000-s00000.{attempt}.tar"} for attempt in ("..", "a/b", "a2", "", "a\n")]
    changes += [{"parts": [{"field": field, "sha256": "ab" * 32, "bytes": 1}]} for field in ("..", "/x", "a/b", 3)]
    changes += [{"moments": {**body["moments"], "var": value}} for value in (None, -1.0, "1", [1])]
    for change in changes:
        atomic.write_json(commits.commit_path("memory://hostile", "d000-s00000"), body | change)
        try:
            commit = commits.read("memory://hostile", "d000-s00000")
        except StorageError:
            continue
        own = "shards/d000-s00000.a1" + (".tar" if layout == "blocks" else "")
        assert (commit.payload, commit.index) == (own, "index/d000-s00000.a1.parquet"), change


def test_temporary_files_among_the_commits_are_ignored(make_store) -> None:
    root = make_store(draws=1)
    (root / "commits" / ".tmp-1-abcdef-d000-s00009.json").write_text("{")
    assert len(commits.committed(root, 1)) == 3


WORKER = """
import sys, numpy as np
from nfm.storage.ledger import commits
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.format.spec import read_spec
root, attempt = sys.argv[1:]
spec = read_spec(root)
for draw in range(2):
    for shard in range(spec.shards_per_draw):
        if commits.read(root, f"d{draw:03d}-s{shard:05d}") is not None:
            continue
        slots = np.array(spec.slots_of(shard))
        noise = np.random.default_rng((draw, shard)).normal(size=(len(slots), *spec.image_shape))
        image = np.zeros(noise.shape, np.uint8)
        records = [{"image": image, "noise": noise.astype("f4"), "label": slots % 10, "slot": slots}]
        written = write_shard(root, spec, draw, shard, attempt, records)
        commits.publish(root, written)
        print(draw, shard, flush=True)
"""


def test_a_worker_killed_at_any_moment_leaves_whole_shards_and_can_go_on(tmp_path: Path, small_spec: StoreSpec) -> None:
    spec = dataclasses.replace(small_spec, rows=400)
    write_spec(tmp_path, spec)
    for attempt, wait in enumerate((0.0, 0.004, 0.011)):
        child = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), f"k{attempt}"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for commit in commits.committed(tmp_path, 2).values():
            assert atomic.hash_file(tmp_path / commit.payload)[0] == commit.payload_sha256
            assert atomic.hash_file(tmp_path / commit.index)[0] == commit.index_sha256
    subprocess.run([sys.executable, "-c", WORKER, str(tmp_path), "last"], check=True, stdout=subprocess.DEVNULL)
    found = commits.committed(tmp_path, 2)
    assert len(found) == 2 * spec.shards_per_draw
    for commit in found.values():
        shard = MappedShard(tmp_path / commit.payload, spec.fields, commit.records, spec.rows_per_block)
        assert shard.read("slot", 0, commit.records).tolist() == list(spec.slots_of(commit.shard))


def test_a_full_disk_makes_no_shard_and_leaves_nothing(tmp_path: Path, small_spec: StoreSpec) -> None:
    spec = dataclasses.replace(small_spec, rows=40_000, rows_per_shard=40_000)
    write_spec(tmp_path, spec)
    done = subprocess.run(
        ["sh", "-c", f'ulimit -f 1024; "{sys.executable}" -c "$0" "{tmp_path}" a1', WORKER],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert "StorageError" in done.stderr
    assert "d000-s00000.a1.tar: cannot write" in done.stderr
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["spec.json"]
