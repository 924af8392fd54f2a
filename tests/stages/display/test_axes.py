"""Axes hold the data and can be read."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from nfm.stages.display import plots
from nfm.stages.display.axes import density_span, log_ticks, make_log, mark_solvers, noise_edges, robust_limits


def words(picture: str) -> list[list[str]]:
    """What is written in the light and the dark plot: matplotlib notes it where it draws letters."""
    return [
        re.findall(r"<!-- (.*?) -->", base64.b64decode(data).decode())
        for data in re.findall(r"svg\+xml;base64,([^\"]+)", picture)
    ]


@pytest.mark.parametrize("low", [1e-5, 0.3, 1.0, 1.58, 9.7, 123.0, 4e7])
@pytest.mark.parametrize("times", [1.01, 1.1, 1.5, 2.1, 4.0, 9.0, 50.0, 1e3, 1e9])
def test_a_logarithmic_axis_has_three_labels_and_holds_its_values(low: float, times: float) -> None:
    axes = Figure().subplots()
    make_log(axes.yaxis, [low, low * times])
    bottom, top = axes.get_ylim()
    assert bottom < low < low * times < top
    ticks = log_ticks(bottom, top)
    assert 3 <= len(ticks) <= 12
    assert all(bottom <= tick <= top for tick in ticks)
    labels = [axes.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert len(set(labels)) == len(labels)


def test_a_logarithmic_axis_of_one_value_or_none_that_is_positive_is_drawn() -> None:
    for values in ([3.0], [], [0.0, -1.0], [float("nan")]):
        axes = Figure().subplots()
        make_log(axes.xaxis, values)
        assert len(axes.get_xticks()) >= 3


@pytest.mark.parametrize("furthest", [0.5, 4.0, 6.0, 7.0, 40.0])
def test_a_histogram_of_noise_cuts_no_tail(furthest: float) -> None:
    values = np.array([0.1, -furthest, furthest, 0.2])
    edges = noise_edges(values)
    assert edges[0] < -furthest
    assert edges[-1] > furthest
    assert np.histogram(values, edges)[0].sum() == 4
    low, high = density_span(values, edges)
    bars = np.histogram(values, edges)[0] / (4 * np.diff(edges))
    assert low < bars[bars > 0].min()
    assert high >= bars.max()


def test_where_euler_becomes_heun_is_marked_between_them() -> None:
    axes = Figure().subplots()
    axes.set(xscale="log", xlim=(1, 40))
    mark_solvers(axes, {"heun": [31, 7], "euler": [5, 3]}, "black")
    (line,) = axes.lines
    assert 5 < line.get_xdata()[0] < 7
    assert [text.get_text() for text in axes.texts] == ["Euler", "Heun"]
    mark_solvers(axes, {"heun": [7], "euler": [5, 9]}, "black")  # not apart: nothing to mark
    assert len(axes.lines) == 1


def test_plots_of_the_report_name_their_axes_in_both_themes() -> None:
    line = {"nfm": ([5, 7], [3.0, 2.0])}
    drawn = {
        plots.distance_by_nfe(line, {}, "a", "W2", {"euler": [5], "heun": [7]}):
            {"W2 (lower is better)", "NFE", "5", "7", "Euler", "Heun", "nfm student"},
        plots.noise_histogram({"nfm": np.zeros(9)}, "a"): {"value of z", "density (linear)", "density (log)"},
        plots.points_of_the_plane({"data": np.ones((3, 2))}, "a"): {"first coordinate", "second coordinate"},
        plots.curves({"nfm": ([1000], [0.5])}, "pairs seen", "loss", "a"): {"pairs seen", "loss", "nfm"},
    }  # fmt: skip
    for picture, expected in drawn.items():
        both = words(picture)
        assert len(both) == 2
        for found in both:
            assert expected <= set(found)


def test_limits_of_one_loss_hold_it() -> None:
    low, high = robust_limits([[2e-6]])
    assert low < 2e-6 < high < 1e-5
