"""Layout `zarr`: stock zarr opens a sealed store, our reader maps it, and a wrong index is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from nfm.storage import layouts
from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.files import atomic
from nfm.storage.format import codecs
from nfm.storage.format.spec import StoreSpec
from nfm.storage.layouts.zarr_shard import shard_bytes
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from nfm.storage.verify import verify

zarr = pytest.importorskip("zarr")


@pytest.fixture
def stock_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _all(spec: StoreSpec, records, draw: int) -> dict[str, np.ndarray]:
    """Every record of a draw, as stored."""
    chunks = [chunk for shard in range(spec.shards_per_draw) for chunk in records(spec, draw, shard)]
    whole = {field.name: np.concatenate([chunk[field.name] for chunk in chunks]) for field in spec.fields}
    return whole | {"noise": codecs.pack(whole["noise"], spec.codec, spec.noise_step)[0]}


def _files(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_ino) for p in root.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("stock_warnings_are_errors")
@pytest.mark.parametrize(
    ("codec", "image_dtype", "label"),
    [("float16", "uint8", True), ("float32", "float16", False), ("int8", "float32", True)],
)
def test_stock_zarr_opens_a_sealed_store(make_store, spec_of, records, codec, image_dtype, label) -> None:
    spec = spec_of("zarr", codec, image_dtype, label)
    root = make_store(2, spec)
    group = zarr.open(str(root), mode="r")
    assert StoreSpec.from_dict(group.attrs["nfm"]) == spec
    for draw in range(2):
        expected = _all(spec, records, draw)
        assert set(group[f"d{draw:03d}"]) == set(expected)
        for name, array in expected.items():
            stock = group[f"d{draw:03d}"][name]
            np.testing.assert_array_equal(stock[...], array)
            assert stock.dtype == array.dtype
            assert stock.shards[0] == spec.rows_per_shard
            assert stock.chunks[0] == spec.rows_per_block
    noise = group["d001/noise"]
    assert noise.attrs["codec"] == codec
    if codec == "int8":
        np.testing.assert_allclose(noise[:5] * noise.attrs["noise_step"], codecs.unpack(noise[:5], 0.05))


def test_ours_reads_what_stock_reads(make_store, spec_of) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec)
    entries = seal.load(root, 1).shards
    stock = zarr.open(str(root), mode="r")["d000"]
    for entry in entries:
        shard = layouts.open_shard(spec, [root / f.path for f in layouts.files(spec, entry)], entry.records)
        first = entry.shard * spec.rows_per_shard
        for field in spec.fields:
            found = shard.read(field.name, 3, entry.records)
            np.testing.assert_array_equal(found, stock[field.name][first + 3 : first + entry.records])


def test_every_file_is_hashed_and_placed_with_its_commits_bytes(make_store, spec_of) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec, sealed=False)
    commit = commits.read(root, "d000-s00001")
    staged = layouts.files(spec, commit, sealed=False)
    assert [file.path for file in staged] == [f"shards/d000-s00001.a1/{field.name}" for field in spec.fields]
    assert commit.payload.sha256 == atomic.content_digest(file.sha256 for file in staged)
    assert commit.payload.bytes == sum(file.bytes for file in staged)
    assert not layouts.missing(root, spec, commit)
    sealed = seal.seal(root, 1)
    assert not (root / commit.payload.path).exists()
    assert not layouts.missing(root, spec, commit)
    placed = layouts.files(spec, sealed.shards[1])
    assert [file.path for file in placed][:2] == ["d000/image/c/1/0/0/0", "d000/noise/c/1/0/0/0"]
    for file, before in zip(placed, staged):
        assert atomic.hash_file(root / file.path) == (before.sha256, before.bytes)
    for path, data in layouts.of(spec).metadata(spec, 1).items():
        assert (root / path).read_bytes() == data


def test_adding_a_draw_leaves_every_earlier_file_untouched(make_store, spec_of, add_draw) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec)
    before = _files(root)
    add_draw(root, spec)
    assert seal.newest(root).number == 2
    after = _files(root)
    assert before.items() <= after.items()
    np.testing.assert_array_equal(zarr.open(str(root), mode="r")["d001/slot"][...], np.arange(50))


def test_sealing_goes_on_wherever_it_was_killed(make_store, spec_of) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec, sealed=False)
    commit = commits.read(root, "d000-s00000")
    moves = list(zip(layouts.files(spec, commit, sealed=False), layouts.files(spec, commit)))
    staged, placed = moves[0]
    atomic.place(root / staged.path, root / placed.path)  # one file placed, and of the next the second name made
    (root / moves[1][1].path).parent.mkdir(parents=True)
    (root / moves[1][1].path).hardlink_to(root / moves[1][0].path)
    sealed = seal.seal(root, 1)
    assert not (root / "shards" / "d000-s00000.a1").exists()
    assert commits.publish(root, commit) == commit  # a worker that repeats itself after the seal
    assert seal.build(root, spec, 1) == sealed.body
    np.testing.assert_array_equal(zarr.open(str(root), mode="r")["d000/slot"][...], np.arange(50))


def test_sealing_without_a_committed_file_names_it(make_store, spec_of) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec, sealed=False)
    (root / "shards/d000-s00001.a1/noise").unlink()
    with pytest.raises(MissingShard, match=r"d000-s00001\.a1/noise"):
        seal.seal(root, 1)
    assert seal.newest(root) is None


def test_a_losing_attempt_leaves_nothing(tmp_path: Path, spec_of, records) -> None:
    spec = spec_of("zarr")
    first, second = (write_shard(tmp_path, spec, 0, 0, a, records(spec, 0, 0)) for a in ("a", "b"))
    won = commits.publish(tmp_path, first)
    assert commits.publish(tmp_path, second) == won == commits.read(tmp_path, "d000-s00000")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["d000-s00000.a"]
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["d000-s00000.a.parquet"]


def test_wrong_records_make_no_shard_and_leave_nothing(tmp_path: Path, spec_of, records) -> None:
    spec = spec_of("zarr")
    with pytest.raises(StorageError, match="14 records, 20 were announced"):
        write_shard(tmp_path, spec, 0, 0, "a", list(records(spec, 0, 0))[:-1])
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize("at", [0, 50, 83])
def test_a_flipped_byte_in_a_chunk_is_seen_by_stock_zarr_and_by_ours(make_store, spec_of, at: int) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec)
    path = root / "d000/image/c/0/0/0/0"
    _flip(path, 84 + at)  # the second chunk: 5 records of 16 bytes, and their crc32c
    with pytest.raises(ValueError, match="checksum"):
        zarr.open(str(root), mode="r")["d000/image"][5:10]
    assert any("image/c/0" in finding.file for finding in verify(root, level="default"))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _open(root: Path, spec: StoreSpec, number: int = 0) -> Any:
    entry = seal.load(root, 1).shards[number]
    return layouts.open_shard(spec, [root / f.path for f in layouts.files(spec, entry)], entry.records)


@pytest.mark.parametrize("back", [1, 4, 5, 21, 60])
def test_a_damaged_index_is_refused_at_opening(make_store, spec_of, back: int) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec)
    path = root / "d000/noise/c/0/0/0/0"
    _flip(path, path.stat().st_size - back)
    with pytest.raises(CorruptShard, match=r"noise/c/0/0/0/0.*index"):
        _open(root, spec)


def test_an_index_that_points_elsewhere_is_refused_though_its_check_sum_is_right(make_store, spec_of) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec)
    path = root / "d000/noise/c/0/0/0/0"
    data = path.read_bytes()
    for entry in ([(0, 2**63)] * 4, [(2**64 - 1, 2**64 - 1)] * 4, [(10**15, 100)] * 4, [(0, 0)] * 4):
        index = b"".join(struct.pack("<QQ", *pair) for pair in entry)
        path.write_bytes(data[:-68] + index + struct.pack("<I", google_crc32c.value(index)))
        with pytest.raises(CorruptShard, match="index"):
            _open(root, spec)


@pytest.mark.parametrize("size", [0, 1, 67, 68, 200])
def test_a_truncated_or_missing_file_is_refused(make_store, spec_of, size: int) -> None:
    spec = spec_of("zarr")
    root = make_store(1, spec)
    path = root / "d000/noise/c/0/0/0/0"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptShard, match="noise/c/0/0/0/0"):
        _open(root, spec)
    path.unlink()
    with pytest.raises(MissingShard, match="noise/c/0/0/0/0"):
        _open(root, spec)


def test_the_overhead_is_the_check_sums_and_the_index(make_store, spec_of) -> None:
    spec = spec_of("zarr", rows=40)
    root = make_store(1, spec)
    for field in spec.fields:
        path = root / f"d000/{field.name}/c/0{'/0' * len(field.shape)}"
        assert path.stat().st_size == shard_bytes(field, 20, 20, 5) == 20 * field.bytes_per_record + 4 * 4 + 4 * 16 + 4


def test_chunks_of_zeros_are_written(make_store, spec_of) -> None:
    spec = dataclasses.replace(spec_of("zarr"), rows=20, rows_per_shard=20, rows_per_block=1)
    root = make_store(1, spec)  # the image of slot 0 is all zero
    path = root / "d000/image/c/0/0/0/0"
    index = np.frombuffer(path.read_bytes()[-324:-4], "<u8").reshape(20, 2)
    np.testing.assert_array_equal(index[:, 1], 20)


def test_metadata_is_plain_json_of_the_specification(spec_of) -> None:
    found = layouts.LAYOUTS["zarr"].metadata(spec_of("zarr", "int8"), 2)
    assert set(found) == {"zarr.json"} | {f"d{d:03d}/zarr.json" for d in (0, 1)} | {
        f"d{d:03d}/{name}/zarr.json" for d in (0, 1) for name in ("image", "noise", "label", "slot")
    }
    noise = json.loads(found["d001/noise/zarr.json"])
    assert noise["data_type"] == "int8"
    inner = noise["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "crc32c"]
    assert layouts.LAYOUTS["blocks"].metadata(spec_of("blocks"), 2) == {}
