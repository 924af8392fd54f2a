"""Invalid IDX files are refused by name with a remedy, and never read as something else."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.stages.base import StageError
from nfm.stages.data.config import DataConfig
from nfm.stages.data.source import Loaded
from nfm.stages.data.sources import Idx
from nfm.stages.data.stage import open_source, run
from tests.stages.data.test_sources import write_idx
from tests.support.recorder import Recorder

ROWS = 30


def folder(root: Path, labels: np.ndarray, suffix: str = "") -> Path:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 6, 4), dtype=np.uint8)
    write_idx(root / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(root / f"train-labels-idx1-ubyte{suffix}", labels.astype(np.uint8))
    return root


def loaded(root: Path, report: Recorder | None = None, **settings: Any) -> tuple[Idx, Loaded]:
    source = Idx(str(root), **settings)
    return source, source.load(np.arange(len(source.labels)), root, report or Recorder())


def test_labels_from_one_are_refused_and_taken_on_purpose(tmp_path: Path) -> None:
    folder(tmp_path, np.arange(ROWS) % 3 + 1)
    with pytest.raises(StageError, match=r"labels run from 1 to 3, expected to begin with 0.*data\.first_label = 1"):
        loaded(tmp_path)
    config = DataConfig(source="idx", path=str(tmp_path), first_label=1)
    source = open_source(config)
    assert source.labels.tolist() == (np.arange(ROWS) % 3).tolist()
    assert source.load(np.arange(ROWS), tmp_path, Recorder()).rejected == {}


def test_a_label_far_above_the_others_is_refused_by_its_row(tmp_path: Path) -> None:
    labels = np.arange(ROWS) % 3
    labels[8] = 255
    with pytest.raises(StageError, match=r"train/0000008 has label 255.*the next one below is 2.*data\.classes"):
        loaded(folder(tmp_path, labels))
    assert list(loaded(tmp_path, classes=["a", "b", "c"])[1].rejected) == [8]


def test_a_class_without_images_is_told(tmp_path: Path) -> None:
    report = Recorder()
    loaded(folder(tmp_path, np.arange(ROWS) % 2 * 2), report)
    assert "1 of 3 classes have no image: labels 1" in report.said[0]


def test_pixels_that_are_all_dark_are_told(tmp_path: Path) -> None:
    report = Recorder()
    folder(tmp_path, np.arange(ROWS) % 3)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.arange(ROWS * 24, dtype=np.uint8).reshape(ROWS, 6, 4) % 16)
    loaded(tmp_path, report)
    assert "uint8 from 0 to 15, where 255 is white" in report.said[0]


def test_half_a_test_set_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, np.arange(ROWS) % 3)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(5, np.uint8))
    with pytest.raises(StageError, match=r"t10k-images-idx3-ubyte\[\.gz\] is missing beside the labels"):
        loaded(tmp_path)


def test_files_of_nearly_the_name_are_listed(tmp_path: Path) -> None:
    (tmp_path / "train-images.idx3-ubyte").write_bytes(b"")
    with pytest.raises(StageError, match=r"but train-images\.idx3-ubyte: rename them so, or set data\.path"):
        loaded(tmp_path)


def test_images_without_pixels_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, np.arange(ROWS) % 3)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((ROWS, 0, 4), np.uint8))
    with pytest.raises(StageError, match="30x0x4, have no pixels"):
        loaded(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_header_that_promises_more_than_there_is_costs_nothing(tmp_path: Path, suffix: str) -> None:
    """2^96 bytes, and a size that is 0 when it is counted in 64 bits."""
    file = folder(tmp_path, np.arange(ROWS) % 3, suffix) / f"train-images-idx3-ubyte{suffix}"
    for sizes in (b"\xff" * 12, b"\x80\0\0\0" * 2 + b"\0\0\0\4"):
        raw = (0x803).to_bytes(4, "big") + sizes + bytes(10)
        file.write_bytes(gzip.compress(raw) if suffix else raw)
        with pytest.raises(StageError, match=r"train-images-idx3-ubyte.*(fetch the file anew|Fetch the file anew)"):
            loaded(tmp_path)


def test_a_file_that_unpacks_to_far_more_than_images_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfm.stages.data.source.BOMB_BYTES", 1 << 20)
    folder(tmp_path, np.arange(ROWS) % 3, ".gz")
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((ROWS, 512, 128), np.uint8))
    with pytest.raises(StageError, match=r"train-images-idx3-ubyte\.gz: .* bytes that unpack to 1,966,080"):
        loaded(tmp_path)


def test_gzip_data_is_known_by_its_content(tmp_path: Path) -> None:
    """A server or a person took the ending off, or put it on."""
    labels = np.arange(ROWS) % 3
    plain, zipped, renamed = (tmp_path / name for name in ("plain", "zipped", "renamed"))
    for root, suffix in ((plain, ""), (zipped, ".gz"), (renamed, ".gz")):
        root.mkdir()
        folder(root, labels, suffix)
    for file in list(renamed.iterdir()):
        file.rename(file.with_suffix(""))
    named_gz = tmp_path / "named"
    named_gz.mkdir()
    for file in folder(plain, labels).iterdir():
        (named_gz / f"{file.name}.gz").write_bytes(file.read_bytes())
    first = Idx(str(plain))
    for root in (zipped, renamed, named_gz):
        source = Idx(str(root))
        np.testing.assert_array_equal(source.pixels, first.pixels)
        assert source.digest() == first.digest()


IMAGES_3 = (0x803).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ((0x801).to_bytes(4, "big"), "magic 0x00000801, expected 0x00000803: these are labels where images were"),
        ((0x803).to_bytes(4, "little"), "magic 0x03080000, .*its header is little-endian; write magic and sizes big"),
        ((0xD03).to_bytes(4, "big"), "float32 values of 3 dimensions where images are uint8 of 3; save them so"),
        ((0x804).to_bytes(4, "big"), "uint8 values of 4 dimensions where images are uint8 of 3; save them so"),
        (b"PK\3\4", "magic 0x504b0304, .*not the IDX file that its name says; fetch the file anew"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_is_not_idx_images_is_described(tmp_path: Path, start: bytes, says: str, suffix: str) -> None:
    file = folder(tmp_path, np.arange(ROWS) % 3, suffix) / f"train-images-idx3-ubyte{suffix}"
    raw = start + b"\x7f" * 12 + bytes(10)  # sizes that nothing must be made of
    file.write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(StageError, match=f"train-images-idx3-ubyte{suffix}: .*{says}"):
        Idx(str(tmp_path))


def test_gzip_data_within_gzip_is_told(tmp_path: Path) -> None:
    file = folder(tmp_path, np.arange(ROWS) % 3, ".gz") / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(StageError, match="gzip data within gzip; unpack it once"):
        Idx(str(tmp_path))


def test_swapped_files_are_reported(tmp_path: Path) -> None:
    folder(tmp_path, np.arange(ROWS) % 3)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    images.rename(tmp_path / "third")
    labels.rename(images)
    (tmp_path / "third").rename(labels)
    with pytest.raises(StageError, match="these are labels where images were expected; rename the files"):
        Idx(str(tmp_path))


def test_a_plain_file_with_too_large_a_header_is_shorter_than_that(tmp_path: Path) -> None:
    folder(tmp_path, np.arange(ROWS) % 3)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES_3 + b"\x7f" * 12 + bytes(10))
    with pytest.raises(StageError, match=r"is shorter than its header promises: 10 of the .* bytes of values"):
        Idx(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES_3)
    with pytest.raises(StageError, match="only 4 bytes, an IDX file of images begins with more: fetch the file anew"):
        Idx(str(tmp_path))


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_a_file_without_images_is_refused_by_name(tmp_path: Path, part: str) -> None:
    folder(tmp_path, np.arange(ROWS) % 3)
    write_idx(tmp_path / f"{part}-images-idx3-ubyte", np.zeros((0, 6, 4), np.uint8))
    write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.zeros(0, np.uint8))
    config = DataConfig(source="idx", path=str(tmp_path))
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=f"{part}-images-idx3-ubyte: holds no image: fetch the file anew"):
        run(config, {}, tmp_path / "out", Recorder())


@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_a_plain_and_a_gzipped_file_of_one_name_must_be_the_same(tmp_path: Path, kind: str) -> None:
    folder(folder(tmp_path, np.arange(ROWS) % 3), np.arange(ROWS) % 3, ".gz")
    assert loaded(tmp_path)[1].rejected == {}
    file = tmp_path / f"train-{kind}-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(StageError, match=f"train-{kind}-ubyte and train-{kind}-ubyte.gz hold different content: take"):
        loaded(tmp_path)
