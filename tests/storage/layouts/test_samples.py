"""Layout `samples`: the WebDataset convention for stock pipelines, arrays for ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfm.storage.errors import CorruptShard, MissingShard, StorageError
from nfm.storage.format.fields import pair_fields
from nfm.storage.layouts.tar_samples import (
    LABEL_BYTES,
    MappedSamples,
    SampleWriter,
    label_text,
    parse_labels,
    shard_bytes,
)

FIELDS = pair_fields((2, 3, 5), "float16")
FIRST = 123_456


def _arrays(records: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (records, 2, 3, 5)).astype(np.uint8),
        "noise": rng.normal(size=(records, 2, 3, 5)).astype(np.float16),
        "label": rng.integers(-5, 1000, records),
        "slot": np.arange(FIRST, FIRST + records),
    }


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """40 records of draw 7."""
    path, arrays = tmp_path / "x.tar", _arrays(40)
    with SampleWriter(path, FIELDS, 40, 7, FIRST) as writer:
        for start in range(0, 40, 9):
            writer.append({name: array[start : start + 9] for name, array in arrays.items()})
    return path


def test_what_is_written_is_read(shard: Path) -> None:
    arrays, mapped = _arrays(40), MappedSamples(shard, FIELDS, 40)
    for name, array in arrays.items():
        np.testing.assert_array_equal(mapped.read(name, 0, 40), array)
        np.testing.assert_array_equal(mapped.read(name, 11, 23), array[11:23])
        assert mapped.read(name, 3, 3).shape == (0, *array.shape[1:])


def test_stock_webdataset_decodes_one_record_a_sample(shard: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    arrays = _arrays(40)
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"d007-{slot:09d}" for slot in arrays["slot"]]
    assert [sample["cls"] for sample in samples] == arrays["label"].tolist()
    for name in ("image", "noise"):
        found = np.stack([sample[f"{name}.npy"] for sample in samples])
        np.testing.assert_array_equal(found, arrays[name])
        assert found.dtype == arrays[name].dtype


def test_gnu_tar_lists_and_extracts_it(shard: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("needs the tar command")
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    key = f"d007-{FIRST:09d}"
    assert listed.stdout.splitlines()[:3] == [f"{key}.image.npy", f"{key}.noise.npy", f"{key}.cls"]
    subprocess.run(["tar", "xf", shard, "-C", shard.parent], check=True)
    assert int((shard.parent / f"{key}.cls").read_text()) == _arrays(40)["label"][0]


def test_the_overhead_at_64_pixels_is_about_eight_percent() -> None:
    fields = pair_fields((3, 64, 64), "float16")
    payload = sum(field.bytes_per_record for field in fields if field.role in ("image", "noise"))
    assert shard_bytes(fields, 4096) / (4096 * payload) < 1.085


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_labels_of_any_size_are_text_of_fixed_width(labels: list[int]) -> None:
    array = np.array(labels, np.int64)
    text = label_text(array)
    assert text.shape == (len(labels), LABEL_BYTES)
    assert [int(bytes(row)) for row in text] == labels
    np.testing.assert_array_equal(parse_labels(text), array)


@pytest.mark.parametrize("text", [b"", b"1 ", b"1-", b"--1", b"1 1", b"x", b"-", b"- 1", b"007", b"+1", b"9" * 20])
def test_text_that_is_not_a_label_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptShard, match="label"):
        parse_labels(np.frombuffer(text.rjust(LABEL_BYTES), np.uint8).reshape(1, -1))


def test_slots_that_the_position_cannot_say_are_refused(tmp_path: Path) -> None:
    arrays = _arrays(4)
    with (
        pytest.raises(StorageError, match="123456 was next"),
        SampleWriter(tmp_path / "x.tar", FIELDS, 4, 0, FIRST) as writer,
    ):
        writer.append(arrays | {"slot": arrays["slot"] + 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 512, 5000])
def test_a_truncated_shard_is_refused_at_opening(shard: Path, cut: int) -> None:
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(CorruptShard, match=r"x\.tar.*bytes.*nfm audit"):
        MappedSamples(shard, FIELDS, 40)


@pytest.mark.parametrize("at", [0, 7, 30, 150, 512, 600])
def test_a_damaged_header_is_refused_at_opening(shard: Path, at: int) -> None:
    data = bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptShard, match=r"byte|slot"):
        MappedSamples(shard, FIELDS, 40)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingShard, match=r"x\.tar"):
        MappedSamples(tmp_path / "x.tar", FIELDS, 4)
