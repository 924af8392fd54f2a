"""IDX files that are not what they should be: told by name, with what to do, and never taken for something else."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.stages.data import DataConfig, open_source
from nfm.stages.sources import Idx
from nfm.stages.sources.source import Loaded
from nfm.stages.stage import StageError
from tests.stages.recorder import Recorder
from tests.stages.test_sources import write_idx

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
    with pytest.raises(StageError, match=r"\(30, 0, 4\), have no pixels"):
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
    monkeypatch.setattr("nfm.stages.sources.source.BOMB_BYTES", 1 << 20)
    folder(tmp_path, np.arange(ROWS) % 3, ".gz")
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((ROWS, 512, 128), np.uint8))
    with pytest.raises(StageError, match=r"train-images-idx3-ubyte\.gz: .* bytes that unpack to 1,966,080"):
        loaded(tmp_path)
