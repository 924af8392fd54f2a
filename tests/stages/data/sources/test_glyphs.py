"""The promises of source `glyphs`: its letters can be told apart, and follow from the settings alone."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.pipeline.config import image_shape
from nfm.stages.base import StageError, Stopped, Unfit
from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig
from nfm.stages.data.sources import Glyphs, glyphs
from nfm.stages.data.stage import source_identity
from nfm.storage import ImageDataset
from tests.support.recorder import Recorder


def drawn(source: Glyphs, tmp_path: Path, rows: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(source.count) if rows is None else rows
    return np.array(source.load(rows, tmp_path, Recorder()).images)


def test_letters_are_grey_centred_and_told_apart(tmp_path: Path) -> None:
    source = Glyphs("ABCDEF", 8, 1200, 0)
    images = drawn(source, tmp_path)
    assert (images.shape, images.dtype) == ((1200, 1, 8, 8), np.uint8)
    assert source.classes == list("ABCDEF")
    assert np.bincount(source.labels).tolist() == [200] * 6
    assert len(np.unique(images)) > 200  # greys, not black and white
    assert 20 < images.mean() < 120
    assert images.mean(axis=(0, 1))[2:6, 2:6].mean() > 2 * images.mean(axis=(0, 1))[[0, -1]].mean()
    # Means of the classes on the first half name the letters of the other half far better than chance, 1 in 6.
    flat = images.reshape(len(images), -1).astype(float)
    means = np.stack([flat[:600][source.labels[:600] == label].mean(axis=0) for label in range(6)])
    named = ((flat[600:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (named == source.labels[600:]).mean() > 0.7


def test_an_image_is_the_letter_turned_about_its_shifted_centre(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(glyphs, "FONTS", ("DejaVuSans.ttf",))
    monkeypatch.setattr(glyphs, "SCALES", (0.5, 0.5))

    def one(turn: float, shift: float) -> np.ndarray:
        monkeypatch.setattr(glyphs, "TURN", turn)
        monkeypatch.setattr(glyphs, "SHIFT", shift)
        return drawn(Glyphs("I", 32, 40, 3), tmp_path)[:, 0].astype(float)

    still = one(0, 0)
    assert (still == still[0]).all()
    down, across = np.indices((32, 32)) - 15.5

    def moments(images: np.ndarray) -> np.ndarray:
        weight = images / images.sum(axis=(1, 2), keepdims=True)
        x, y = (weight * across).sum(axis=(1, 2)), (weight * down).sum(axis=(1, 2))
        xx, yy = (weight * across**2).sum(axis=(1, 2)) - x * x, (weight * down**2).sum(axis=(1, 2)) - y * y
        lean = np.arctan2(2 * ((weight * across * down).sum(axis=(1, 2)) - x * y), yy - xx) / 2  # of the long axis
        return np.stack([x, y, np.degrees(lean)])

    np.testing.assert_allclose(moments(still), 0, atol=0.3)  # pixels and degrees
    x, y, lean = moments(one(0, 0.1))
    assert 2 < max(np.abs(x).max(), np.abs(y).max()) < 3.6  # 0.1 of 32 pixels, on a grid of thirds
    assert np.abs(lean).max() < 1
    x, y, lean = moments(one(0.13, 0))
    assert max(np.abs(x).max(), np.abs(y).max()) < 0.3
    assert 10 < np.abs(lean).max() < 15.5
    assert lean.min() < 0 < lean.max()


def test_a_row_depends_on_letters_size_seed_and_its_number_alone(tmp_path: Path) -> None:
    whole = drawn(Glyphs("abc", 12, 300, 7), tmp_path)
    rows = np.array([299, 5, 17])
    np.testing.assert_array_equal(drawn(Glyphs("abc", 12, 300, 7), tmp_path, rows), whole[rows])
    np.testing.assert_array_equal(drawn(Glyphs("abc", 12, 100, 7), tmp_path), whole[:100])
    assert (drawn(Glyphs("abc", 12, 300, 8), tmp_path) != whole).any(axis=(1, 2, 3)).all()


def test_chunks_change_nothing_and_each_looks_for_a_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, report = Glyphs("AB", 8, 50, 0), Recorder()
    whole = drawn(source, tmp_path)
    monkeypatch.setattr(glyphs, "CHUNK_POINTS", 7 * 64 * 64)
    np.testing.assert_array_equal(source.load(np.arange(50), tmp_path, report).images, whole)
    assert [done for done, _, _ in report.seen] == [0, 7, 14, 21, 28, 35, 42, 49, 50]
    with pytest.raises(Stopped):
        source.load(np.arange(50), tmp_path, Recorder(patience=3))


def test_the_digest_follows_what_is_drawn_and_not_where_the_fonts_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def digest(**options: Any) -> str:
        return str(source_identity(DataConfig(**{"source": "glyphs", "count": 50} | options))["digest"])

    before = digest()
    assert before == digest(heldout=0.5, rows_per_shard=7, limit=20, licence="mine")
    assert len({before, digest(seed=1), digest(count=51), digest(size=9), digest(letters="ABCDEG")}) == 5
    folder = Path(shutil.copytree(glyphs._folder(), tmp_path / "fonts"))
    monkeypatch.setattr(glyphs, "_folder", lambda: folder)
    assert digest() == before
    shutil.copy(folder / "DejaVuSans-Bold.ttf", folder / "DejaVuSans.ttf")
    assert digest() != before
    monkeypatch.undo()
    monkeypatch.setattr(glyphs, "GENERATOR", 2)
    assert digest() != before


def test_the_data_stage_holds_letters_out_and_names_them(tmp_path: Path) -> None:
    config = DataConfig(source="glyphs", letters="Qä7", size=10, count=200, heldout=0.25)
    result = stage.run(config, {}, tmp_path, Recorder())
    train, heldout = (ImageDataset.open(tmp_path, split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (150, 50)
    assert (train.image_shape, train.classes) == ((1, 10, 10), ["Q", "ä", "7"]) == (image_shape(config), train.classes)
    rows = np.array([int(key.split("/")[1]) for key in train.keys(range(150))])
    source = stage.open_source(config)
    np.testing.assert_array_equal(train.images(range(150)), source.load(rows, tmp_path, Recorder()).images)
    np.testing.assert_array_equal(train.labels(range(150)), rows % 3)
    assert result.extra["dataset"]["licence"] == "made by this program"


@pytest.mark.parametrize(
    ("letters", "says"),
    [
        ("", r'data\.letters = "" names no letter'),
        ("ABA", r"data\.letters = 'ABA' names 'A' twice"),
        ("A B", r"data\.letters = 'A B': ' ' draws nothing"),
        ("A\u0301", r"draws nothing by itself"),
        ("A\U0001f600", r"is not in the font .*\.ttf: leave it out"),
        ("A\u05d0", r"is not in the font .*\.ttf: leave it out"),
    ],
)
def test_letters_that_cannot_be_classes_are_refused(letters: str, says: str) -> None:
    with pytest.raises(Unfit, match=says):
        stage.open_source(DataConfig(source="glyphs", letters=letters))


def test_missing_or_broken_fonts_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fonts = glyphs._folder()
    monkeypatch.setattr(glyphs, "_folder", lambda: tmp_path)
    with pytest.raises(StageError, match=r"DejaVuSans\.ttf: .*No such file.*pip install --force-reinstall matplotlib"):
        Glyphs("A", 8, 9, 0)
    shutil.copytree(fonts, tmp_path, dirs_exist_ok=True)
    (tmp_path / "STIXGeneral.ttf").write_bytes(b"no font")
    with pytest.raises(StageError, match=r"STIXGeneral\.ttf: .*pip install --force-reinstall matplotlib"):
        Glyphs("A", 8, 9, 0)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unfit, match=r"fonts inside matplotlib: pip install 'nfm-pairs\[train,report\]'"):
        Glyphs("A", 8, 9, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "digits", "letters": "AB"}, r"data\.letters = 'AB' is of source glyphs, not of \"digits\""),
        ({"source": "digits", "size": 9}, r"data\.size = 9 is of source glyphs, not of \"digits\""),
        ({"source": "checkerboard", "points": 9, "count": 9}, r"data\.count = 9 is of source glyphs"),
        ({"source": "glyphs", "points": 9}, r'data\.points = 9: source "glyphs" has images, .* data\.count'),
        ({"source": "glyphs", "average": 2}, r"data\.average = 2 is of source digits, .* not of \"glyphs\""),
    ],
)
def test_settings_of_other_sources_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(Unfit, match=says):
        stage.open_source(DataConfig(**options))


def test_the_fields_of_glyphs_leave_older_fingerprints_alone() -> None:
    assert not {"letters", "size", "count"} & set(DataConfig().semantic())
