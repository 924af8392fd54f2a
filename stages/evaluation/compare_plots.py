"""The plots of a comparison as PNG: distance against NFE, loss against pairs seen, curvature, speed against
distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nfm.stages.couplings.facts import colours_of
from nfm.stages.couplings.variant import Variant
from nfm.stages.display.axes import compact, make_log, mark_solvers, marked, robust_limits
from nfm.stages.display.plots import Panel, Theme, legend, png
from nfm.stages.evaluation.compare_rows import Row, images_per_second, mean, same_speeds
from nfm.stages.evaluation.compare_table import label, shown
from nfm.stages.evaluation.table import DISTANCE
from nfm.stages.trained.sampling import REFERENCE

DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")  # five, with four dash styles: twenty variants of a coupling look different
HATCHES = ("", "//", "\\\\", "xx", "..", "--", "||", "++", "oo", "**")  # of bars
FAR = 8  # a level so many times below all students is shown only in the legend
WIDE, ROW = (9.2, 4.2), 0.36  # inches


class Style(NamedTuple):
    """How a variant is drawn in every plot: in the colour of its coupling, with its own dashes, marker and hatching."""

    colour: str
    dashes: str
    marker: str
    hatch: str

    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "ls": self.dashes, "marker": self.marker, "ms": 5, "lw": 1.7}


def draw(body: Row) -> dict[str, bytes]:
    """The plots as PNG, by file name."""
    styles = _styles(list(body["seeds"]))
    plots = {
        "distance.png": png([_distance(body, styles)], WIDE),
        "loss.png": png([_loss(body, styles)], WIDE),
        "curvature.png": png([_curvature(body, styles)], (6.4, 1.1 + ROW * len(body["curvature"]))),
    }
    # Speeds of different machines must not share a plot.
    if len(body["machines"]) == 1 and any("images_per_second" in row["speeds"] for row in body["rows"]):
        plots["speed.png"] = png([_speed(body, styles)], WIDE)
    return plots


def _styles(variants: list[str]) -> dict[str, Style]:
    found: dict[str, Style] = {}
    count: dict[str, int] = {}
    for name in sorted(variants, key=lambda name: name != Variant.parse(name).coupling):  # the plain ones are solid
        coupling = Variant.parse(name).coupling
        number = count[coupling] = count.get(coupling, -1) + 1
        found[name] = Style(colours_of(coupling)[0], DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)],
                            HATCHES[number % len(HATCHES)])  # fmt: skip
    return found


def _distance(body: Row, styles: Mapping[str, Style]) -> Panel:
    """Both axes are logarithmic, because distances at one evaluation are tens of times those at many."""
    key = body["distance"]

    def panel(axes: Any, theme: Theme) -> None:
        inside: list[float] = []
        for name, rows in _by_variant(body).items():
            rows = sorted(rows, key=lambda row: row["nfe"])
            means = [mean(row, key) for row in rows]
            none = [f"{shown(value)} at NFE {row['nfe']}" for row, value in zip(rows, means) if value <= 0]
            told = f"{name} ({', '.join(none)}: not on this axis)" if none else name
            axes.plot([row["nfe"] for row in rows], means, label=told, **styles[name].line())
            inside += [one for row, value in zip(rows, means) for one in _ends(value, row["metrics"][key]["spread"])]
            for row in rows:
                if row["metrics"][key]["spread"] is not None:
                    axes.errorbar(row["nfe"], mean(row, key), row["metrics"][key]["spread"], color=styles[name].colour,
                                  capsize=3, lw=1.2)  # fmt: skip
        levels = [("teacher", row) for row in body["teacher"]] + [("floor", body["floor"])]
        for number, (series, row) in enumerate(levels):
            style = {"color": theme.series[series], "lw": 1.2, "ls": DASHES[(number + 1) % len(DASHES)]}
            if _beyond(body, row):
                axes.plot([], [], label=f"{label(row)} {shown(mean(row, key))}, below", **style)
            else:
                inside.append(mean(row, key))
                axes.axhline(mean(row, key), label=label(row), **style)
        _nfe_axis(axes, body, theme)
        axes.set_ylabel(f"{DISTANCE[key]} (lower is better)")
        make_log(axes.yaxis, inside)
        legend(axes, theme, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return panel


def _loss(body: Row, styles: Mapping[str, Style]) -> Panel:
    """One line for each student. Students of one variant that differ only in the seed look the same."""

    def panel(axes: Any, theme: Theme) -> None:
        named: set[str] = set()
        for line in body["losses"]:
            name, (seen, losses) = line["variant"], np.array(line["curve"], float).T
            # Mark every point of a short line, but only some of a long one.
            every = {} if marked(len(seen)) else {"markevery": 0.15}
            style = {**styles[name].line(), "ms": 4, "lw": 1.3, **every}
            seeds = body["seeds"][name]
            told = f"{name}, {len(seeds)} seeds" if len(seeds) > 1 else name
            axes.plot(seen, losses, label=None if name in named else told, **style)
            named.add(name)
        limits = robust_limits([[loss for _, loss in line["curve"]] for line in body["losses"]])
        axes.set(xlabel="pairs seen", ylabel="flow-matching loss", ylim=limits)
        axes.xaxis.set_major_formatter(compact)
        legend(axes, theme, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return panel


def _curvature(body: Row, styles: Mapping[str, Style]) -> Panel:
    def panel(axes: Any, theme: Theme) -> None:
        for place, row in enumerate(body["curvature"]):
            found = row["value"]
            style = styles[row["variant"]]
            bar = {"color": style.colour, "height": 0.62, "error_kw": {"lw": 1.2, "capsize": 3, "ecolor": theme.ink}}
            filled = {"hatch": style.hatch, "edgecolor": "white", "lw": 0} if style.hatch else {}
            axes.barh(place, found["mean"], xerr=found["spread"], **bar, **filled)
            end = (found["mean"] + (found["spread"] or 0.0), place)
            axes.annotate(shown(found["mean"]), end, xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=8, color=theme.ink)  # fmt: skip
        axes.set_yticks(range(len(body["curvature"])), [row["variant"] for row in body["curvature"]])
        axes.invert_yaxis()
        axes.margins(x=0.12)  # room for the figures
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.set(xlabel="curvature (0 is straight)", xlim=(0, None))

    return panel


def _speed(body: Row, styles: Mapping[str, Style]) -> Panel:
    """Images per second against distance, with a point for each sampler and NFE. Up and to the left is better.

    Of rows that are equally fast, the fastest measurement counts for all: it was disturbed the least.
    """
    key = body["distance"]
    fastest = {id(row): max(map(images_per_second, group)) for group in same_speeds(body) for row in group}

    def panel(axes: Any, theme: Theme) -> None:
        along: list[float] = []
        up: list[float] = []
        points: dict[Any, list[tuple[Row, float, float]]] = {}
        for name, rows in _by_variant(body).items():
            rows = [row for row in sorted(rows, key=lambda row: row["nfe"]) if "images_per_second" in row["speeds"]]
            speeds = [fastest.get(id(row)) or images_per_second(row) for row in rows]
            means = [mean(row, key) for row in rows]
            axes.plot(means, speeds, label=name, **styles[name].line())
            along, up = [*along, *means], [*up, *speeds]
            for row, x, y in zip(rows, means, speeds):
                group = REFERENCE if row["sampler"] == REFERENCE else row["nfe"]
                points.setdefault(group, []).append((row, x, y))
        # Variants at one NFE are as fast as each other: a label each would lie on the next one's.
        for found in points.values():
            counts = [row["nfe"] for row, _, _ in found]
            told = " to ".join(map(str, sorted({min(counts), max(counts)})))
            _, *rightmost = max(found, key=lambda point: point[1])
            axes.annotate(f"NFE {told}", rightmost, xytext=(7, -3), textcoords="offset points", fontsize=8,
                          color=theme.ink)  # fmt: skip
        for number, row in enumerate(row for row in body["teacher"] if "images_per_second" in row["speeds"]):
            speed = images_per_second(row)
            style = {"color": theme.series["teacher"], "ls": "", "marker": MARKERS[number % len(MARKERS)], "ms": 7}
            axes.plot([mean(row, key)], [speed], label=label(row), **style)
            along, up = [*along, mean(row, key)], [*up, speed]
        floor = mean(body["floor"], key)
        style = {"color": theme.series["floor"], "lw": 1.2, "ls": ":"}
        if _beyond(body, body["floor"]):
            axes.plot([], [], label=f"floor {shown(floor)}, left of this", **style)
        else:
            along = [*along, floor]
            axes.axvline(floor, label="floor", **style)
        axes.set(xlabel=f"{DISTANCE[key]} (lower is better)", ylabel="images a second")
        make_log(axes.xaxis, along, aside=0.12)
        make_log(axes.yaxis, up)
        legend(axes, theme, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return panel


def _beyond(body: Row, row: Row) -> bool:
    """Whether a level is so far below all students that the axis would show mostly the gap."""
    lowest = min(mean(student, body["distance"]) for student in body["rows"])
    return mean(row, body["distance"]) <= lowest / FAR


def _ends(value: float, spread: float | None) -> tuple[float, float]:
    """The two ends of an error bar."""
    return value - (spread or 0.0), value + (spread or 0.0)


def _nfe_axis(axes: Any, body: Row, theme: Theme) -> None:
    from matplotlib.ticker import NullLocator

    rows = [row for row in body["rows"] if row["sampler"] != REFERENCE]
    ticks = sorted({row["nfe"] for row in rows})
    axes.set(xlabel="NFE", xscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    solvers: dict[str, list[int]] = {}
    for row in rows:
        solvers.setdefault(row["sampler"], []).append(row["nfe"])
    mark_solvers(axes, solvers, theme.ink)


def _by_variant(body: Row) -> dict[str, list[Row]]:
    return {name: [row for row in body["rows"] if row["variant"] == name] for name in body["seeds"]}
