"""Shards are plain tars that stock tools read, and arrays that we map."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files.atomic import hash_file
from nfm.storage.format.fields import pair_fields
from nfm.storage.layouts.tar_blocks import MappedShard, ShardWriter, shard_bytes

FIELDS = pair_fields((2, 3, 5), "float16")


def _arrays(records: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (records, 2, 3, 5)).astype(np.uint8),
        "noise": rng.normal(size=(records, 2, 3, 5)).astype(np.float16),
        "label": rng.integers(0, 10, records),
        "slot": np.arange(records),
    }


def _write(path: Path, arrays: dict[str, np.ndarray], block: int = 16, chunk: int = 7) -> None:
    records = len(arrays["slot"])
    with ShardWriter(path, FIELDS, records, "d000-s00000", block) as writer:
        for start in range(0, records, chunk):
            writer.append({name: array[start : start + chunk] for name, array in arrays.items()})


@given(records=st.integers(1, 70), block=st.integers(1, 20), chunk=st.integers(1, 80), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_what_is_written_is_read_at_any_size(
    tmp_path_factory: pytest.TempPathFactory, records: int, block: int, chunk: int, seed: int
) -> None:
    path, arrays = tmp_path_factory.mktemp("tar") / "x.tar", _arrays(records, seed)
    _write(path, arrays, block, chunk)
    assert path.stat().st_size == shard_bytes(FIELDS, records, block)
    shard = MappedShard(path, FIELDS, records, block)
    rng = np.random.default_rng(seed)
    start, stop = sorted(rng.integers(0, records + 1, 2).tolist())
    for name, array in arrays.items():
        np.testing.assert_array_equal(shard.read(name, start, stop), array[start:stop])
        assert shard.read(name, 0, records).dtype == array.dtype


def test_the_bytes_depend_on_the_records_alone(tmp_path: Path) -> None:
    arrays = _arrays(50)
    _write(tmp_path / "a.tar", arrays, chunk=7)
    _write(tmp_path / "b.tar", arrays, chunk=50)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_payload_states_the_digest_and_size_of_the_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.tar", FIELDS, 5, "k")
    writer.append(_arrays(5))
    (payload,) = writer.close()
    assert (payload.sha256, payload.bytes) == hash_file(payload.path)


def test_gnu_tar_lists_and_extracts_the_shard(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs the tar command")
    _write(tmp_path / "x.tar", _arrays(40))
    listed = subprocess.run(["tar", "tvf", tmp_path / "x.tar"], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names[:4] == [f"d000-s00000-b00000.{field.name}.npy" for field in FIELDS]
    assert len(names) == 3 * 4
    subprocess.run(["tar", "xf", tmp_path / "x.tar", "-C", tmp_path], check=True)
    noise = np.load(tmp_path / "d000-s00000-b00002.noise.npy", allow_pickle=False)
    np.testing.assert_array_equal(noise, _arrays(40)["noise"][32:])


def test_stock_webdataset_reads_the_same_arrays(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    arrays = _arrays(40)
    _write(tmp_path / "x.tar", arrays)
    samples = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"d000-s00000-b{block:05d}" for block in range(3)]
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate([sample[f"{name}.npy"] for sample in samples]), array)


def test_members_carry_no_time_and_no_owner(tmp_path: Path) -> None:
    _write(tmp_path / "x.tar", _arrays(5))
    with tarfile.open(tmp_path / "x.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.uname) == (0, 0, "")
            data = archive.extractfile(member)
            assert data is not None
            np.lib.format.read_array(BytesIO(data.read()), allow_pickle=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a | {"extra": a["slot"]}, "extra"),
        (lambda a: {k: v for k, v in a.items() if k != "label"}, "label"),
        (lambda a: a | {"noise": a["noise"].astype(np.float32)}, "'noise' is float32"),
        (lambda a: a | {"image": a["image"][:, :1]}, "'image' is uint8"),
        (lambda a: {k: np.concatenate([v, v]) for k, v in a.items()}, "10 records, 5 were announced"),
        (lambda a: {k: v[:3] for k, v in a.items()}, "3 records, 5 were announced"),
    ],
)
def test_records_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path, change, said: str) -> None:
    with pytest.raises(StorageError, match=said), ShardWriter(tmp_path / "x.tar", FIELDS, 5, "k") as writer:
        writer.append(change(_arrays(5)))
    assert list(tmp_path.iterdir()) == []


def test_a_key_too_long_for_ustar_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="shorter key"),
        ShardWriter(tmp_path / "x.tar", FIELDS, 5, "k" * 300) as writer,
    ):
        writer.append(_arrays(5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 512, 5000])
def test_a_truncated_shard_is_refused_at_opening(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.tar"
    _write(path, _arrays(40))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorruptShard, match=r"x\.tar.*bytes.*nfm audit"):
        MappedShard(path, FIELDS, 40, 16)


@pytest.mark.parametrize("at", [3, 150, 520, 600])
def test_a_damaged_header_is_refused_at_opening(tmp_path: Path, at: int) -> None:
    path = tmp_path / "x.tar"
    _write(path, _arrays(40))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match="byte 0"):
        MappedShard(path, FIELDS, 40, 16)


def test_a_missing_or_empty_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingShard, match=r"x\.tar"):
        MappedShard(tmp_path / "x.tar", FIELDS, 40)
    (tmp_path / "x.tar").touch()
    with pytest.raises(CorruptShard, match="0 bytes"):
        MappedShard(tmp_path / "x.tar", FIELDS, 40)


def test_records_outside_the_shard_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "x.tar", _arrays(40))
    shard = MappedShard(tmp_path / "x.tar", FIELDS, 40, 16)
    for start, stop in ((0, 41), (-1, 3), (5, 4)):
        with pytest.raises(StorageError, match="holds 40"):
            shard.read("slot", start, stop)
