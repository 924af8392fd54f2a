"""Images of two values are points, drawn where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.stages.display.pictures import save_grid
from nfm.stages.display.points import MARGIN, SIDE, are_points, coordinates, reach


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 1), (1, 2, 1)])
def test_an_image_of_two_values_is_a_point(shape: tuple[int, int, int]) -> None:
    assert are_points(shape)
    assert coordinates(np.zeros((5, *shape))).shape == (5, 2)
    assert not are_points((1, 2, 2))


@pytest.mark.parametrize("furthest", [0.0, 1e-6, 0.9, 1.0, 3.2, 7.0, 1e5])
def test_the_square_holds_every_point(furthest: float) -> None:
    points = np.array([[furthest, 0.1 * furthest], [0.0, -furthest]])
    assert furthest <= reach(points) <= max(1.0, 1.06 * furthest + 1)


def test_a_grid_of_points_is_a_scatter_with_each_point_in_its_place(tmp_path: Path) -> None:
    points = np.array([[1.5, -0.5], [-1.0, 1.2], [np.nan, 0.0]], np.float32)
    save_grid(tmp_path / "p.png", points.reshape(3, 1, 1, 2), image_dtype="float32")
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    blue = np.abs(picture - (0x25, 0x66, 0xD8)).sum(2) == 0
    for x, y in points[:2]:
        across, down = (x + 2) / 4 * SIDE + MARGIN, SIDE - (y + 2) / 4 * SIDE + 32  # reach 2
        assert blue[round(down), round(across)]
    assert 2 * 13 <= blue.sum() <= 2 * 25  # two dots, no third
