"""The table and the picture of a study: one setting varied."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from benchmarks import studies


def told(mean: float, spread: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "spread": spread}


@pytest.fixture
def points() -> dict[str, dict[str, Any]]:
    return {
        draws: {
            "distance": "fd_cnn",
            "floor": told(0.087, 0.007),
            "couplings": {
                name: {
                    "distances": {"7 heun": told(0.5 * far, 0.01), "3 euler": told(far)},
                    "curvature": told(0.0231, 0.0004),
                    "store": {"auc": auc} if auc else {},
                }
                for name, auc in (("nfm", 0.614), ("independent", None))
            },
        }
        for draws, far in (("1", 0.4), ("8", 0.2))
    }


def test_a_comma_in_brackets_is_of_a_value() -> None:
    assert studies.varied("pairs.draws=1,2,4") == ("pairs.draws", ["1", "2", "4"])
    times = ["logit-normal(-0.2,1)", "uniform", "logit-normal(-0.8,1)"]
    assert studies.varied(f"student.times={','.join(times)}") == ("student.times", times)


def test_the_table_has_a_row_a_value_and_coupling_with_the_spread_of_its_seeds(points: dict[str, Any]) -> None:
    heading, names, *rows = studies.as_text("pairs.draws", points).splitlines()
    assert heading.endswith("the floor is 0.087 ± 0.007")
    assert names.split("  ")[0] == "pairs.draws"
    assert [row.split()[:2] for row in rows] == [["1", "nfm"], ["1", "independent"], ["8", "nfm"], ["8", "independent"]]
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]
    assert cells[0][2:] == ["0.200 ± 0.010", "0.400", "0.0231 ± 0.0004", "0.614"]
    assert cells[1][2:] == ["0.200 ± 0.010", "0.400", "0.0231 ± 0.0004"]


def test_the_picture_has_a_panel_a_coupling(points: dict[str, Any]) -> None:
    two = Image.open(io.BytesIO(studies.draw("pairs.draws", points, "glyphs: pairs.draws")))
    for made in points.values():
        del made["couplings"]["independent"]
    one = Image.open(io.BytesIO(studies.draw("pairs.draws", points, "glyphs: pairs.draws")))
    assert two.format == one.format == "PNG"
    assert two.width > one.width + 300
