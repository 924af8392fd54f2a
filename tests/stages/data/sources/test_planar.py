"""The promises of the planar sources: their marginals, their seed, and what changes their identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nfm.stages.base import StageError
from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig
from nfm.stages.data.sources import Checkerboard, Gaussians
from nfm.stages.data.sources.planar import BOARD, MODES, RADIUS, SPREAD
from nfm.stages.data.stage import source_identity
from nfm.storage import ImageDataset
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from pathlib import Path

POINTS = 20_000
SOURCES = [Checkerboard, Gaussians]


def points(source: Checkerboard | Gaussians, tmp_path: Path) -> np.ndarray:
    images = source.load(np.arange(source.points), tmp_path, Recorder()).images
    assert images.dtype == np.float32
    assert images.shape == (source.points, 1, 1, 2)
    return images.reshape(-1, 2).astype(np.float64)


def counts(cells: np.ndarray, number: int) -> np.ndarray:
    return np.bincount(cells, minlength=number)


def evenly(found: np.ndarray) -> None:
    """Each of the counts is within 5 standard deviations of its share."""
    share = found.sum() / len(found)
    assert np.abs(found - share).max() < 5 * np.sqrt(share)


@pytest.mark.parametrize("source", SOURCES)
def test_each_coordinate_has_mean_zero_and_variance_one(source: type, tmp_path: Path) -> None:
    found = points(source(POINTS, 0), tmp_path)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(found.var(axis=0), 1, atol=0.03)
    # The checkerboard's filled squares lie along one diagonal: 3/16 by its eight centres.
    expected = 3 / 16 if source is Checkerboard else 0
    assert np.corrcoef(found.T)[0, 1] == pytest.approx(expected, abs=0.03)


def test_the_checkerboard_fills_every_other_square_evenly(tmp_path: Path) -> None:
    found = points(Checkerboard(POINTS, 0), tmp_path)
    column, row = np.floor((found / BOARD + 0.5) * 4).astype(int).T
    assert {column.min(), row.min()} == {0}
    assert {column.max(), row.max()} == {3}
    assert ((column + row) % 2 == 0).all()
    evenly(counts(4 * column + row, 16).reshape(4, 4)[np.add.outer(range(4), range(4)) % 2 == 0])
    # Even within a square, too: the quarters of all squares together.
    inside = (found / BOARD + 0.5) * 4 % 1
    evenly(counts((2 * (inside[:, 0] > 0.5) + (inside[:, 1] > 0.5)).astype(int), 4))


def test_the_gaussians_are_eight_equal_modes_on_a_circle(tmp_path: Path) -> None:
    found = points(Gaussians(POINTS, 0), tmp_path)
    turn = 2 * np.pi / MODES
    mode = np.floor(np.arctan2(found[:, 1], found[:, 0]) / turn).astype(int) % MODES
    evenly(counts(mode, MODES))
    centre = RADIUS * np.stack([np.cos((mode + 0.5) * turn), np.sin((mode + 0.5) * turn)], axis=1)
    np.testing.assert_allclose((found - centre).std(axis=0), RADIUS * SPREAD, rtol=0.03)
    for number in range(MODES):
        np.testing.assert_allclose((found - centre)[mode == number].mean(axis=0), 0, atol=0.02)


@pytest.mark.parametrize("source", SOURCES)
def test_points_are_of_the_seed_and_more_of_them_leave_the_first_ones(source: type, tmp_path: Path) -> None:
    found = points(source(500, 3), tmp_path)
    np.testing.assert_array_equal(points(source(500, 3), tmp_path), found)
    np.testing.assert_array_equal(points(source(900, 3), tmp_path)[:500], found)
    assert not np.isin(points(source(500, 4), tmp_path), found).any()
    assert len(np.unique(found)) == found.size


def test_the_digest_moves_with_source_seed_and_number_of_points_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(**options: object) -> str:
        return source_identity(DataConfig(**{"source": "checkerboard", "points": 50} | options))["digest"]

    assert digest() == digest(heldout=0.5, rows_per_shard=7, limit=20, licence="mine")
    assert len({digest(), digest(seed=1), digest(points=51), digest(source="gaussians")}) == 4
    before = digest()
    monkeypatch.setattr("nfm.stages.data.sources.planar.GENERATOR", 2)
    assert digest() != before


@pytest.mark.parametrize("source", ["checkerboard", "gaussians"])
def test_the_data_stage_holds_points_out_and_states_their_licence(source: str, tmp_path: Path) -> None:
    config = DataConfig(source=source, points=400, heldout=0.25, seed=5)
    result = stage.run(config, {}, tmp_path, Recorder())
    train, heldout = (ImageDataset.open(tmp_path, split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (300, 100)
    assert (train.image_shape, train.dtype, train.classes) == ((1, 1, 2), "float32", [])
    keys = [*train.keys(range(300)), *heldout.keys(range(100))]
    assert sorted(keys) == [f"{source}/{row:07d}" for row in range(400)]
    rows = np.array([int(key.split("/")[1]) for key in train.keys(range(300))])
    made = stage.open_source(config).load(rows, tmp_path, Recorder()).images
    np.testing.assert_array_equal(train.images(range(300)), made)
    assert (train.labels(range(300)) == -1).all()
    about = result.extra["dataset"]
    assert about["licence"] == "made by this program"
    assert "data.seed" in about["origin"]
    assert about["name"] == source


def test_a_planar_source_without_a_number_of_points_says_what_to_set() -> None:
    with pytest.raises(StageError, match=r'data.source = "gaussians" needs data.points'):
        stage.open_source(DataConfig(source="gaussians"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"points": 9, "source": "digits"}, r'data.points = 9: source "digits" .* data.limit'),
        (
            {"points": 9, "source": "gaussians", "average": 2},
            r'data.average = 2 is of source digits, .* of "gaussians"',
        ),
        (
            {"points": 9, "source": "checkerboard", "classes": ("in", "out")},
            r'data.classes = .* is of source digits, .* of "checkerboard"',
        ),
    ],
)
def test_options_that_a_source_cannot_use_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(StageError, match=says):
        stage.open_source(DataConfig(**options))


def test_the_points_field_leaves_older_fingerprints_alone() -> None:
    assert "points" not in DataConfig().semantic()
    assert DataConfig(source="checkerboard", points=9).semantic()["points"] == 9
