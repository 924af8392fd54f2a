"""The picture of the teacher curve."""

from __future__ import annotations

import io
from typing import Any
from unittest import mock

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import teacher_curve


@pytest.mark.parametrize("best", [0.5, 0.6, 0.97])
def test_labels_stay_inside_and_the_axis_shows_what_is_perfect(best: float) -> None:
    points: list[dict[str, Any]] = [
        {"images": images, "auc": auc, "distance": "fd_cnn",
         "teacher": {"inverse": far}, "student": {"7": far / 2}, "independent": {"7": 3.0}}
        for images, auc, far in ((360_000, best, 3.0), (12_500, 1.0, 22.0))
    ]  # fmt: skip
    figures: list[Figure] = []

    class Kept(Figure):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            figures.append(self)

    with mock.patch.object(teacher_curve, "Figure", Kept):
        data = teacher_curve.draw(points, "fashion14: is the teacher enough?")
    assert Image.open(io.BytesIO(data)).format == "PNG"
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == ["360k", "12.5k"]
    frame = axes.get_window_extent()
    for text in axes.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
    low, high = axes.get_xlim()
    assert low < 0.5 < 1.0 < high
    assert 0.5 in [round(tick, 6) for tick in axes.get_xticks()]
