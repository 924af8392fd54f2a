"""The plots of a comparison: labels, marks and limits, read from the drawn axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from nfm.stages.display.plots import LIGHT, Panel
from nfm.stages.evaluation import compare_plots, compare_table
from tests.stages.evaluation.test_compare import made


def drawn(panel: Panel) -> Any:
    axes = Figure(layout="constrained").subplots()
    panel(axes, LIGHT)
    return axes


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of variants at NFE 7 by Heun and 3 by Euler."""
    folder: Path = tmp_path_factory.mktemp("compared")
    return made(folder)[1]


def styles(body: dict[str, Any]) -> Any:
    return compare_plots._styles(list(body["seeds"]))


def test_distance_marks_where_euler_becomes_heun_and_tells_what_lies_outside(body: dict[str, Any]) -> None:
    axes = drawn(compare_plots._distance(body, styles(body)))
    assert [text.get_text() for text in axes.texts] == ["Euler", "Heun"]
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "floor 2.000, below" in told
    low, high = axes.get_ylim()
    assert low < 19 < 70 < high
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_a_distance_without_a_logarithm_is_named(body: dict[str, Any]) -> None:
    rows = [
        {**row, "metrics": {**row["metrics"], "fd_cnn": {"mean": -0.5, "spread": None}}}
        if (row["variant"], row["nfe"]) == ("independent", 7) else row
        for row in body["rows"]
    ]  # fmt: skip
    axes = drawn(compare_plots._distance({**body, "rows": rows}, styles(body)))
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "independent (-0.5000 at NFE 7: not on this axis)" in told


def test_every_nfe_of_speed_is_named_once_beside_its_last_point(body: dict[str, Any]) -> None:
    axes = drawn(compare_plots._speed(body, styles(body)))
    labels = {text.get_text(): text.xy for text in axes.texts}
    assert sorted(labels) == ["NFE 3", "NFE 7"]
    assert len(axes.texts) == 2
    students = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_label() in body["seeds"]]
    places = sorted((x, y) for line in students for x, y in zip(*line.get_data()))
    assert len(places) == 2 * len(body["seeds"]) == 6
    for x, y in labels.values():
        assert (x, y) in places
        assert x == max(along for along, up in places if up == y)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left < x < right and low < y < high for x, y in places)
    for ticks, (start, end) in ((axes.get_xticks(), (left, right)), (axes.get_yticks(), (low, high))):
        assert sum(start <= tick <= end for tick in ticks) >= 3


def test_the_same_network_is_equally_fast_on_the_pairs_of_every_coupling(body: dict[str, Any]) -> None:
    slow = {"speeds": {"images_per_second": {"mean": 3.0, "spread": None}}}  # measured while the machine was busy
    rows = [{**row, **slow} if (row["variant"], row["nfe"]) == ("nfm", 7) else row for row in body["rows"]]
    disturbed = {**body, "rows": rows}
    before, after = (drawn(compare_plots._speed(one, styles(body))) for one in (body, disturbed))
    shown = [[list(line.get_ydata()) for line in axes.lines] for axes in (before, after)]
    assert shown[0] == shown[1]
    assert "the machine was busy" in compare_table.as_text(disturbed)
    assert "the machine was busy" not in compare_table.as_text(body)


def test_a_loss_of_one_point_is_marked_and_inside(body: dict[str, Any]) -> None:
    losses = [{**line, "curve": [[100, 0.3]]} for line in body["losses"]]
    axes = drawn(compare_plots._loss({**body, "losses": losses}, styles(body)))
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["independent", "nfm, 3 seeds", "nfm:soften=0.5"]
    for line in axes.lines:
        assert line.get_marker() in compare_plots.MARKERS
        assert line.get_markevery() is None
    low, high = axes.get_ylim()
    assert low < 0.3 < high


def test_bars_of_one_coupling_look_different(body: dict[str, Any]) -> None:
    names = ["nfm", "nfm:permuted", "nfm:soften=0.5", "independent"]
    rows = [{"variant": name, "value": {"mean": 0.1, "spread": None}} for name in names]
    found = compare_plots._styles(names)
    bars = drawn(compare_plots._curvature({**body, "curvature": rows}, found)).patches
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == len(names)
    assert bars[0].get_facecolor() == bars[1].get_facecolor() != bars[3].get_facecolor()


def test_the_plain_coupling_is_solid_wherever_it_is_named() -> None:
    for names in (["nfm:permuted", "nfm", "independent"], ["nfm", "independent", "nfm:permuted"]):
        found = compare_plots._styles(names)
        assert (found["nfm"].dashes, found["nfm"].hatch, found["independent"].dashes) == ("-", "", "-")
        assert found["nfm:permuted"].dashes == "--"


def test_every_bar_of_curvature_has_its_figure_within_the_axes(body: dict[str, Any]) -> None:
    rows = [
        {**row, "value": {"mean": 2e-7 if number else 0.5, "spread": None}}
        for number, row in enumerate(body["curvature"])
    ]
    axes = drawn(compare_plots._curvature({**body, "curvature": rows}, styles(body)))
    axes.figure.canvas.draw()
    assert [text.get_text() for text in axes.texts] == ["0.5000"] + ["2.000e-07"] * (len(rows) - 1)
    assert all(text.get_window_extent().x1 <= axes.figure.bbox.x1 for text in axes.texts)
