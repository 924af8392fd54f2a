"""The plots of the report, each drawn for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import numpy as np

from nfm.stages.couplings.facts import FACTS, colours_of
from nfm.stages.display.axes import (
    compact,
    density,
    density_span,
    make_log,
    mark_solvers,
    marked,
    noise_edges,
    normal,
    robust_limits,
)
from nfm.stages.display.pictures import data_uri
from nfm.stages.display.points import panel

Curve = tuple[Sequence[float], Sequence[float]]  # x, y
PANEL_INCHES = (5.1, 3.2)


@dataclass(frozen=True)
class Theme:
    page: int  # 0: light, 1: dark
    ink: str
    line: str
    series: Mapping[str, str]
    others: Sequence[str]

    def colour(self, name: str, number: int) -> str:
        if name in FACTS:
            return colours_of(name)[self.page]
        return self.series.get(name, self.others[number % len(self.others)])


Panel = Callable[[Any, Theme], None]  # draws into matplotlib axes

LIGHT = Theme(
    page=0,
    ink="#414b58",
    line="#dde2e9",
    series={"teacher": "#1d8f61", "floor": "#7a8594"},
    others=("#8e44ad", "#c0396b", "#0f8a9d", "#8a6d1d"),
)
DARK = Theme(
    page=1,
    ink="#b9c2cf",
    line="#303846",
    series={"teacher": "#57cf9d", "floor": "#95a0b0"},
    others=("#c58be0", "#f07aa6", "#58c7d8", "#d6b65c"),
)


def curves(lines: Mapping[str, Curve], x: str, y: str, alt: str) -> str:
    """Lines over the number of images or pairs seen, with a legend.

    `NAME training` and `NAME held-out` share a colour.
    """

    def draw(axes: Any, theme: Theme) -> None:
        for i, (name, (seen, values)) in enumerate(lines.items()):
            base = name.removesuffix(" held-out").removesuffix(" training")
            heldout = name.endswith(" held-out")
            style: dict[str, Any] = {"ls": "--", "marker": "o", "ms": 3} if heldout else marked(len(seen))
            axes.plot(seen, values, color=theme.colour(base, i), lw=1.6, label=name, **style)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_formatter(compact)
        axes.set_ylim(*robust_limits([values for _, values in lines.values()]))
        legend(axes, theme)

    return _picture([draw], alt)


def noise_histogram(samples: Mapping[str, np.ndarray], alt: str) -> str:
    """The density of noise values by coupling, compared with N(0, 1): a linear and a logarithmic plot side by side."""
    edges = noise_edges(*samples.values())
    at = (edges[1:] + edges[:-1]) / 2

    def histogram(scale: str) -> Callable[[Any, Theme], None]:
        def draw(axes: Any, theme: Theme) -> None:
            for i, (name, values) in enumerate(samples.items()):
                found = density(values, edges)
                found = np.where(found > 0, found, np.nan) if scale == "log" else found
                axes.stairs(found, edges, color=theme.colour(name, i), lw=1.5, label=name)
            axes.plot(at, normal(at), color=theme.ink, lw=1, ls="--", label="N(0, 1)")
            axes.set(
                xlabel="value of z",
                ylabel=f"density ({scale})",
            )
            if scale == "linear":
                legend(axes, theme)
            else:
                make_log(axes.yaxis, [end for values in samples.values() for end in density_span(values, edges)])

        return draw

    return _picture([histogram("linear"), histogram("log")], alt)


def points_of_the_plane(sets: Mapping[str, np.ndarray], alt: str) -> str:
    """Points [n, 2] by name, with the same scale on both axes."""

    def draw(axes: Any, theme: Theme) -> None:
        panel(axes, sets, [theme.colour("nfm", 0), theme.colour("independent", 1), *theme.others])
        if len(sets) > 1:
            legend(axes, theme, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return _picture([draw], alt, inches=(5.4 if len(sets) > 1 else 4.2, 3.9))


def distance_by_nfe(
    lines: Mapping[str, Curve],
    levels: Mapping[str, tuple[str, float]],
    alt: str,
    measure: str,
    solvers: Mapping[str, Iterable[int]],
) -> str:
    """A distance, called `measure`, against NFE for students. `levels` are horizontal lines: {label: (series name,
    value)}.

    `solvers` are the NFE of each solver; the change from one to the next is marked.
    """

    def draw(axes: Any, theme: Theme) -> None:
        for i, (name, (nfe, distance)) in enumerate(lines.items()):
            axes.plot(nfe, distance, color=theme.colour(name, i), lw=1.8, marker="o", ms=5, label=f"{name} student")
        for i, (label, (name, value)) in enumerate(levels.items()):
            axes.axhline(value, color=theme.colour(name, i), lw=1.2, ls=("--", ":", "-.")[i % 3], label=label)
        ticks = sorted({step for nfe, _ in lines.values() for step in nfe})
        lowest = min([0.0, *(value for _, values in lines.values() for value in values)])
        axes.set(xlabel="NFE", ylabel=f"{measure} (lower is better)", xscale="log", ylim=(lowest, None))
        mark_solvers(axes, solvers, theme.ink)
        axes.set_xticks(ticks, [str(step) for step in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        legend(axes, theme, loc="upper left", bbox_to_anchor=(1.01, 1.0))

    return _picture([draw], alt, inches=(8.6, 3.8))


def _picture(panels: Sequence[Panel], alt: str, inches: tuple[float, float] = PANEL_INCHES) -> str:
    return _themed(_svg(panels, LIGHT, inches), _svg(panels, DARK, inches), alt)


def png(panels: Sequence[Panel], inches: tuple[float, float] = PANEL_INCHES) -> bytes:
    """The panels side by side on white, for files."""
    return _drawn(
        panels, LIGHT, inches, {"format": "png", "dpi": 150, "facecolor": "white", "metadata": {"Software": None}}
    )


def _svg(panels: Sequence[Panel], theme: Theme, inches: tuple[float, float]) -> bytes:
    return _drawn(panels, theme, inches, {"format": "svg", "transparent": True, "metadata": {"Date": None}})


def _drawn(panels: Sequence[Panel], theme: Theme, inches: tuple[float, float], form: Mapping[str, Any]) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    # A fixed salt, no date and no version, so that the same figures give the same page.
    settings: dict[str, Any] = {"svg.hashsalt": "nfm", "font.size": 10, "axes.spines.top": False}
    settings |= {
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
    }
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink)
    settings |= {"axes.edgecolor": theme.ink, "axes.linewidth": 0.8, "axes.facecolor": "none"}
    file = io.BytesIO()
    with matplotlib.rc_context(cast(Any, settings)):
        sheet = Figure(figsize=(inches[0] * len(panels), inches[1]), layout="constrained")
        for axes, draw in zip(np.atleast_1d(sheet.subplots(1, len(panels))), panels):
            draw(axes, theme)
        sheet.savefig(file, **form)
    return file.getvalue()


def legend(axes: Any, theme: Theme, **place: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink, **place)


def _themed(light_svg: bytes, dark_svg: bytes, alt: str) -> str:
    """A plot drawn twice. The browser shows the one that fits its colour scheme."""
    dark, light = data_uri("image/svg+xml", dark_svg), data_uri("image/svg+xml", light_svg)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>'
    )
