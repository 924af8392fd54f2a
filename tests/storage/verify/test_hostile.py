"""Hostile stores end in a StorageError or in data that is in bounds: nothing executes, hangs, or reads outside."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from nfm.storage import PairStore, StorageError
from nfm.storage.files import atomic
from nfm.storage.ledger.row_fields import RowField
from nfm.storage.verify import verify
from tests.storage.fuzz.run import fuzz
from tests.storage.fuzz.signing import reseal
from tests.support.patience import allowed
from tests.support.sizes import sized

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "store-format-1"
SECONDS = sized(1.5, 10.0)


def test_seconds_of_fuzzing_find_no_defect() -> None:
    """The first cases of `python -m tests.storage.fuzz.run --seed 0`."""
    tally = fuzz(SECONDS, seed=0, least=20)
    calls = sum(sum(counts.values()) for counts in tally.outcomes.values())
    print(f"{tally.cases} cases, {calls} calls, {sum(tally.seen.values())} defects: {tally.outcomes}")
    assert [(defect["case"], defect["kind"], defect["mutations"]) for defect in tally.defects] == []
    assert tally.cases >= 20


def store(tmp_path: Path, layout: str = "blocks") -> Path:
    shutil.copytree(FIXTURES / layout, tmp_path / "store")
    shutil.copytree(FIXTURES / layout, tmp_path / "outside")
    return tmp_path / "store"


def refused(root: Path) -> str:
    """What every reader says of a store that it must refuse; verification has a finding."""
    with pytest.raises(StorageError) as told:
        read(root)
    assert verify(root, level="deep")
    return str(told.value)


def read(root: Path) -> Any:
    found = PairStore.open(root)
    return [found.gather(draw, range(len(found))) for draw in range(found.draws)], found.index()


NAMES = [
    "../outside/shards/d000-s00000.fixture1.tar",
    "shards/../../outside/shards/d000-s00000.fixture1.tar",
    "/etc/passwd",
    "shards/d000-s00001.fixture1.tar",
    "shards/d000-s00000.fixture1.tar\0",
    "shards//d000-s00000.fixture1.tar",
    "s3://bucket/shards/d000-s00000.fixture1.tar",
    "",
    7,
    None,
    ["shards/d000-s00000.fixture1.tar"],
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    root = store(tmp_path)
    for number in (1, 2):
        path = root / f"manifest.g000{number}.json"
        body = atomic.read_json(path)
        body["shards"][0]["payload"] = name
        atomic.write_json(path, body)
    refused(root)


@pytest.mark.parametrize(
    "file",
    [
        "spec.json",
        "manifest.g0002.json",
        "shards/d000-s00000.fixture1.tar",
        "index/d001-s00001.fixture1.parquet",
        "commits/d000-s00000.json",
        "fields/caption/field.json",
        "fields/caption/s00001.fixture1.npy",
        "shards",
        "commits",
        "fields",
    ],
)
def test_a_link_out_of_the_store_is_not_followed_even_to_the_same_bytes(tmp_path: Path, file: str) -> None:
    root = store(tmp_path)
    path = root / file
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(tmp_path / "outside" / file)
    assert any("no file of this store" in f.problem or "link" in f.problem for f in verify(root)), verify(root)
    if file.startswith("fields"):
        with pytest.raises(StorageError, match="a link out of the store"):
            RowField.open(root, "caption").gather(range(9))
    elif not file.startswith("commits"):
        assert "a link out of the store" in refused(root)


def test_a_store_may_itself_be_a_link(tmp_path: Path) -> None:
    root = store(tmp_path)
    (tmp_path / "link").symlink_to(root)
    read(tmp_path / "link")
    assert verify(tmp_path / "link", level="deep") == []


@pytest.mark.parametrize(
    "file",
    ["spec.json", "manifest.g0002.json", "shards/d000-s00000.fixture1.tar", "index/d001-s00001.fixture1.parquet"],
)
def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path: Path, file: str) -> None:
    root = store(tmp_path)
    (root / file).unlink()
    os.mkfifo(root / file)
    started = time.monotonic()
    refused(root)
    assert time.monotonic() - started < allowed(5)


@pytest.mark.parametrize("depth", [500, 100_000])
def test_deep_json_is_refused(tmp_path: Path, depth: int) -> None:
    root = store(tmp_path)
    (root / "manifest.g0002.json").write_bytes(b'{"digest": "x", "a":' + b"[" * depth + b"]" * depth + b"}")
    refused(root)


HEADERS = {
    "object dtype": "{'descr': '|O', 'fortran_order': False, 'shape': (2, 1, 2, 3), }",
    "huge shape": "{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807), }",
    "negative size": "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 1, 2, 3), }",
    "fortran order": "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 1, 2, 3), }",
    "code": "__import__('os').system('touch /tmp/executed')",
}


@pytest.mark.parametrize("what", HEADERS)
def test_an_npy_header_that_is_not_ours_is_refused_though_all_digests_agree(tmp_path: Path, what: str) -> None:
    root = store(tmp_path)
    path = root / "shards" / "d000-s00000.fixture1.tar"
    data = bytearray(path.read_bytes())
    data[522:640] = HEADERS[what].encode().ljust(117) + b"\n"
    path.write_bytes(data)
    reseal(root)
    assert "is not 2 records" in refused(root)


def _far(data: bytearray, at: int) -> None:
    struct.pack_into("<QQ", data, at, 2**62, 16)


def _overlapping(data: bytearray, at: int) -> None:
    struct.pack_into("<QQ", data, at + 16, *struct.unpack_from("<QQ", data, at))


def _larger(data: bytearray, at: int) -> None:
    struct.pack_into("<QQ", data, at, 0, 2**64 - 1)


def _absent(data: bytearray, at: int) -> None:
    struct.pack_into("<QQ", data, at, 2**64 - 1, 2**64 - 1)


@pytest.mark.parametrize("change", [_far, _overlapping, _larger, _absent])
def test_a_zarr_index_that_leads_elsewhere_is_refused_though_all_digests_agree(
    tmp_path: Path, change: Callable[[bytearray, int], None]
) -> None:
    root = store(tmp_path, "zarr")
    path = root / "d000" / "noise" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    at = len(data) - 4 - 3 * 16  # three chunks a shard
    change(data, at)
    data[-4:] = google_crc32c.value(bytes(data[at:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    reseal(root)
    assert "its index does not place" in refused(root)
