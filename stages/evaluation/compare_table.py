"""A comparison as aligned text and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nfm.stages.couplings.variant import Variant
from nfm.stages.display.tables import aligned
from nfm.stages.display.units import ratio as ratio_text
from nfm.stages.evaluation.compare_rows import REPORTED, Row, images_per_second, mean, same_speeds
from nfm.stages.evaluation.table import DISTANCE, Column, below, columns_of, cut, level, strained
from nfm.stages.trained.sampling import REFERENCE

MOST_DECIMALS, TINY = 6, 1e-3
# Where no NFE is so small that independent noise suffers from it, nfm is compared with half of its distance above the
# floor at this one.
HALF_AT_NFE = 7
MOST_DIGITS = 12
UNEVEN = 1.25  # times the slowest measurement of a speed
BUSY = " Students of one NFE are the same network: where their speeds differ, the machine was busy."


def as_text(body: Row) -> str:
    """Distance by NFE for each variant, all metrics and speeds of every sampler, curvature, stores and conclusions."""
    measured = [_by_nfe(body), f"{_full(body)}\n{_machines(body)}", _straightness(body)]
    parts = [*measured, _sources(body), "\n".join([*cut(body), *_below(body)]), " ".join(body["conclusions"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def conclusions(body: Row) -> list[str]:
    """The best variant at each NFE and those level with it; whether nfm halves the distance above the floor, at the
    largest NFE where too few steps are what independent noise suffers from; how much straighter its paths are.

    Permuted controls are left out. So is the reference solver, because its tolerance decides its evaluations.
    """
    key, unit = body["distance"], DISTANCE[body["distance"]]
    rows = [row for row in body["rows"] if not _control(row) and row["sampler"] != REFERENCE]
    best = []
    for nfe in sorted({row["nfe"] for row in rows}, reverse=True):
        winner, *others = sorted((row for row in rows if row["nfe"] == nfe), key=lambda row: mean(row, key))
        even = [row["variant"] for row in others if _level(winner, row, body)]
        aside = f", level with {' and '.join(even)}" if even else ""
        best.append(f"{winner['variant']} at NFE {nfe} ({shown(mean(winner, key))}{aside})")
    told = [f"Smallest {unit}{_aside(body)}: {', '.join(best)}."] if best else []
    nfm = [row for row in rows if _share(row["variant"], "nfm") >= 0.5]
    plain = [row for row in rows if row["variant"] == "independent"]
    common = {row["nfe"] for row in nfm} & {row["nfe"] for row in plain}
    if not common:
        return told
    alone = {row["nfe"]: mean(row, key) for row in plain}
    few = [nfe for nfe in strained(alone) if nfe in common]
    nfe = few[0] if few else min(common, key=lambda one: (abs(one - HALF_AT_NFE), one))
    candidates = [row for row in nfm if row["nfe"] == nfe]
    ours = min(candidates, key=lambda row: mean(row, key))
    chosen = f", the best of {len(candidates)} nfm variants," if len(candidates) > 1 else ""
    theirs = next(row for row in plain if row["nfe"] == nfe)
    floor = mean(body["floor"], key)
    above, other = mean(ours, key) - floor, mean(theirs, key) - floor
    if other <= 0:
        return [
            *told,
            f"At NFE {nfe}, independent lies {shown(-other)} below the floor of {shown(floor)}: nothing to halve.",
        ]
    verdict = "at most half" if above <= other / 2 else "more than half"
    where = f", where independent is {ratio_text(alone[nfe] / min(alone.values()))} times its own best" if few else ""
    told.append(
        f"At NFE {nfe}{where}, {ours['variant']}{chosen} lies {shown(above)} above the floor of {shown(floor)} and "
        f"independent {shown(other)}: {_against_half(above / other)} of it, {verdict}."
    )
    curves = {row["variant"]: row["value"]["mean"] for row in body["curvature"]}
    if not {ours["variant"], "independent"} <= curves.keys():  # sampled by functions of their own
        return told
    ratio = curves[ours["variant"]] / max(curves["independent"], 1e-12)
    return [*told, f"The curvature of {ours['variant']} is {ratio_text(ratio)} times independent's."]


def _level(one: Row, other: Row, body: Row) -> bool:
    """Whether the distances of two rows are level, by the spread over their seeds or that of the floor."""
    key = body["distance"]
    spreads = [row["metrics"][key]["spread"] or 0.0 for row in (one, other, body["floor"])]
    return level(mean(one, key), mean(other, key), max(spreads))


def _against_half(share: float) -> str:
    """A ratio with the usual digits, or with enough digits to show on which side of one half it is."""
    told = (ratio_text(share, digits) for digits in range(2, MOST_DIGITS))
    return next((text for text in told if (float(text) <= 0.5) == (share <= 0.5)), repr(share))


def _share(name: str, coupling: str) -> float:
    """The share of a variant's pairs that comes from this coupling."""
    variant = Variant.parse(name)
    return 1 - math.fsum(variant.mixture.values()) if variant.coupling == coupling else variant.mixture.get(coupling, 0)


def _control(row: Row) -> bool:
    return Variant.parse(row["variant"]).permuted


def _aside(body: Row) -> str:
    return ", controls aside" if any(_control(row) for row in body["rows"]) else ""


def label(row: Row) -> str:
    """The name of a row in tables and plots."""
    if row["model"] == "student":
        return str(row["variant"])
    guided = f", guidance {row['guidance']:g}" if row.get("guidance") else ""
    return "floor" if row["model"] == "floor" else f"teacher, {row['sampler']}{guided}"


def _by_nfe(body: Row) -> str:
    """One line for each variant, one column for each NFE.

    The best of each column is marked; teacher and floor are below.
    """
    key, columns = body["distance"], list(dict.fromkeys(_column(row) for row in body["rows"]))
    cells: dict[str, dict[str, Row]] = {}
    for row in body["rows"]:
        cells.setdefault(row["variant"], {})[_column(row)] = row
    lowest: dict[str, float] = {}
    for row in body["rows"]:
        if not _control(row):
            lowest[_column(row)] = min(mean(row, key), lowest.get(_column(row), math.inf))

    def cell(row: Row | None, column: str) -> str | None:
        if row is None:
            return None
        best = not _control(row) and mean(row, key) == lowest[column]
        return _figure(row["metrics"][key]) + (" *" if best else "")

    unit = DISTANCE[key]
    lines: list[Sequence[Any]] = [
        [name, *(cell(found.get(one), one) for one in columns)] for name, found in cells.items()
    ]
    levels = "; ".join(f"{label(row)} {_figure(row['metrics'][key])}" for row in (*body["teacher"], body["floor"]))
    over = "standard deviation over seeds, of the floor over draws"
    head = f"{unit} by NFE, mean ± {over}; lower is better, * the best{_aside(body)}"
    return f"{head}\n{aligned(['', *columns], lines)}\n{levels}"


def _below(body: Row) -> list[str]:
    floor = {**_means(body["floor"]), "spread": body["floor"]["metrics"][body["distance"]]["spread"]}
    named = [{**_means(row), "name": f"{label(row)}, NFE {row['nfe']}"} for row in body["rows"]]
    return below([floor, *named, *({**_means(row), "name": label(row)} for row in body["teacher"])])


def _column(row: Row) -> str:
    return REFERENCE if row["sampler"] == REFERENCE else f"{row['nfe']} {row['sampler']}"


def _full(body: Row) -> str:
    """All rows with all columns of an evaluation; with the number of the machine if there are several."""
    rows = [*body["rows"], *body["teacher"], body["floor"]]
    means = [_means(row) for row in rows]
    columns = [column for column in columns_of(means) if column.key not in ("model", "coupling")]
    cells = [[label(row), *(_cell(column, row, flat) for column in columns)] for row, flat in zip(rows, means)]
    titles = ["", *(column.title for column in columns)]
    if len(body["machines"]) > 1:
        titles.append("machine")
        for row, line in zip(rows, cells):
            numbers = [body["machines"].index(machine) + 1 for machine in row["machines"] if row["sampler"]]
            line.append(", ".join(map(str, numbers)) or None)
    return aligned(titles, cells)


def _machines(body: Row) -> str:
    """The machines on which the speeds were measured."""
    machines = body["machines"]
    if len(machines) == 1:
        rates = [list(map(images_per_second, group)) for group in same_speeds(body)]
        uneven = any(max(group) > UNEVEN * min(group) for group in rates)
        return f"Speeds are of {machines[0]}.{BUSY if uneven else ''}"
    told = "; ".join(f"{number} is {machine}" for number, machine in enumerate(machines, 1))
    return (
        f"Speeds are of {len(machines)} machines ({told}): only those of the same one compare, and a row whose seeds "
        "were measured on several has none."
    )


def _means(row: Row) -> Row:
    """The row in the form of a single evaluation, with means in place of single values."""
    measured = {**row["metrics"], **row["speeds"]}
    return {**row, **{key: found["mean"] for key, found in measured.items()}}


def _cell(column: Column, row: Row, means: Row) -> str | None:
    value = column.value(means)
    if value is None:
        return None
    spread = None if column.key.endswith("_error") else row["metrics"].get(column.key, {}).get("spread")
    return format(value, column.spelled) + (
        "" if spread is None else f" ± {format(column.scale * spread, column.spelled)}"
    )


def _straightness(body: Row) -> str:
    if not body["curvature"]:
        return ""
    rows = [[row["variant"], _figure(row["value"], 5), row["steps"], row["trajectories"]] for row in body["curvature"]]
    return aligned(["", "curvature", "Euler steps", "trajectories"], rows)


def _sources(body: Row) -> str:
    """The coupling reports of the stores, and which stores have none."""
    reported = {name: store for name, store in body["stores"].items() if any(key in store for key in REPORTED)}
    lacking = [name for name in body["stores"] if name not in reported]
    missing = f"No coupling report: {', '.join(lacking)}; `nfm pairs report STORE` measures one." if lacking else ""
    if not reported:
        return missing
    rows = [
        [
            name,
            *(None if store.get(key) is None else shown(store[key]) for key in ("auc", "auc_error", "transport_cost")),
        ]
        for name, store in reported.items()
    ]
    table = aligned(["pairs", "AUC of z against N(0, I)", "± s.e.", "transport cost a dimension"], rows)
    return f"{table}\n{missing}".strip("\n")


def _figure(found: Row, digits: int = 4) -> str:
    spread, value = found.get("spread"), float(found["mean"])
    if spread is None:
        return shown(value, digits)
    alike = shown(spread, 2) if 0 < abs(value) < TINY else f"{spread:.{_decimals(value, digits)}f}"
    return f"{shown(value, digits)} ± {alike}"


def shown(value: float, digits: int = 4) -> str:
    """A number with `digits` significant figures. A tiny one has an exponent."""
    return f"{value:.{digits - 1}e}" if 0 < abs(value) < TINY else f"{value:,.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    if not value or not math.isfinite(value):
        return 0
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), MOST_DECIMALS)
