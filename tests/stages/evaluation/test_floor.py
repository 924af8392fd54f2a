"""The floor: held-out images with the samples' labels, drawn several times, and what lies below it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nfm.stages.evaluation import stage
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.evaluation.floor import DRAWS, like
from nfm.stages.evaluation.table import below
from nfm.storage import ImageDataset
from tests.support.recorder import Recorder

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_a_draw_has_the_labels_that_were_asked_for_and_each_image_once() -> None:
    random = np.random.default_rng(0)
    heldout, labels = random.integers(0, 5, 400), random.integers(0, 5, 150)
    draws = [like(labels, heldout, (1, draw)) for draw in range(4)]
    for rows in draws:
        assert len(np.unique(rows)) == len(labels)
        np.testing.assert_array_equal(np.sort(heldout[rows]), np.sort(labels))
    assert len({rows.tobytes() for rows in draws}) == 4
    np.testing.assert_array_equal(like(labels, heldout, (1, 0)), draws[0])
    assert len(np.unique(np.concatenate(draws))) > 300  # every image may be drawn, not only the first ones


def test_other_images_stand_in_where_a_label_has_too_few() -> None:
    heldout, labels = np.array([0, 0, 0, 0, 1, 2]), np.array([1, 1, 1, 7, 0])
    rows = like(labels, heldout, (0,))
    assert len(np.unique(rows)) == 5
    assert 4 in rows
    np.testing.assert_array_equal(like(np.zeros(6, int), heldout, (0,)), np.arange(6))
    np.testing.assert_array_equal(np.sort(like(np.full(3, -1), np.full(3, -1), (0,))), np.arange(3))  # no labels at all


def test_the_floor_has_a_spread_where_enough_is_held_out(made: Lab, tmp_path: Path) -> None:
    inputs = {role: made.only(role).path for role in ("data", "features")}
    held = len(ImageDataset.open(inputs["data"], "heldout"))

    def floor(samples: int) -> tuple[dict[str, Any], str]:
        out = tmp_path / str(samples)
        out.mkdir()
        few: dict[str, Any] = {"kid_subsets": 2, "kid_size": 10}
        stage.run(EvaluateConfig(samples=samples, **few), inputs, out, Recorder())
        (row,) = json.loads((out / stage.TABLE).read_text())["rows"]
        return row, (out / stage.TEXT).read_text()

    half, told = floor(held // 2)
    assert half["samples"] == held // 2
    assert half["floor_draws"] == DRAWS
    assert 0 < half["spread"] < half["fd_cnn"]
    assert "± draws" in told
    nearly_all, told = floor(held - 1)
    assert "spread" not in nearly_all
    assert "± draws" not in told


def rows(distance: float, nearest: float | None, **floor: Any) -> list[dict[str, Any]]:
    real = {"name": "floor", "model": "floor", "fd_cnn": 0.2, "nearest": 1.0, **floor}
    return [real, {"name": "student-nfm-heun-7", "model": "student", "fd_cnn": distance, "nearest": nearest}]


@pytest.mark.parametrize(
    ("nearest", "why"),
    [
        (0.5, "the nearest training image is 0.5 away, of a real one 1: the training set is memorised"),
        (0.9, "the nearest training image is 0.9 away, of a real one 1: not memorised, so the metric"),
        (None, "a fault of the metric, or a memorised training set"),
    ],
)
def test_a_distance_below_the_floor_is_told_with_its_likely_cause(nearest: float | None, why: str) -> None:
    (told,) = below(rows(0.1, nearest, spread=0.03))
    assert told.startswith("student-nfm-heun-7: FD-CNN 0.1 is below the floor of 0.2 ± 0.03, ")
    assert why in told


def test_a_distance_within_the_spread_of_the_floor_or_without_one_is_not_told() -> None:
    assert below(rows(0.15, 0.5, spread=0.03)) == below(rows(0.1, 0.5)) == below(rows(0.1, 0.5, spread=None)) == []


def test_points_have_the_error_of_their_floor_as_its_spread() -> None:
    floor = {"name": "floor", "model": "floor", "w2": 0.2, "w2_error": 0.01}
    (told,) = below([floor, {"name": "x", "model": "student", "w2": 0.1}, {"name": "y", "model": "student", "w2": 0.3}])
    assert told.startswith("x: W2 0.1 is below the floor of 0.2 ± 0.01")
