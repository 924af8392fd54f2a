"""The report's first sentences: whether the student is ahead of independent noise, where, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nfm.stages.couplings.variant import Variant
from nfm.stages.evaluation.table import DISTANCE, Line, distance_key, level, strained
from nfm.stages.report.html import number
from nfm.stages.trained.sampling import REFERENCE

PLAIN = "independent"


def sentences(body: Mapping[str, Any]) -> list[str]:
    """What the page shows in one sentence, and the figures at the NFE where it matters, from `evaluation.json`."""
    rows = body["rows"]
    key = distance_key(rows[0])
    distances: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["model"] == "student" and row["sampler"] != REFERENCE:
            distances.setdefault(str(row["coupling"]), {})[int(row["nfe"])] = float(row[key])
    if not distances:
        return []
    ours = next((name for name in distances if name != PLAIN and not Variant.parse(name).permuted), None)
    plain = distances.get(PLAIN, {})
    common = sorted(set(plain) & set(distances.get(str(ours), {})), reverse=True)
    if ours is None or not common:
        return [_figures(rows, key, min(min(found) for found in distances.values()))]
    shown = next((nfe for nfe in strained(plain) if nfe in common), common[-1])
    curvature = {str(row["coupling"]): float(row["value"]) for row in body.get("curvature") or []}
    spread = next((row.get("spread") for row in rows if row["model"] == "floor"), None) or 0.0
    return [_verdict(ours, distances[ours], plain, spread, curvature), _figures(rows, key, shown)]


def _verdict(
    ours: str, own: Mapping[int, float], plain: Mapping[int, float], spread: float, curved: Mapping[str, float]
) -> str:
    """The first sentence. The spread is that of the floor."""
    common = sorted(set(own) & set(plain), reverse=True)
    even = [nfe for nfe in common if level(own[nfe], plain[nfe], spread)]
    found = {
        f"ahead of {PLAIN} noise": [nfe for nfe in common if nfe not in even and own[nfe] < plain[nfe]],
        "level with it": even,
        "behind it": [nfe for nfe in common if nfe not in even and own[nfe] > plain[nfe]],
    }
    told = [f"{word} at {_evaluations(where)}" for word, where in found.items() if where]
    if not found[f"ahead of {PLAIN} noise"]:
        told[0] = f"not ahead of {PLAIN} noise: {told[0]}"
    return f"The student on {ours} pairs is {', '.join(told)}{_straightness(curved.get(ours), curved.get(PLAIN))}."


def _evaluations(numbers: Sequence[int]) -> str:
    """Numbers of evaluations in words, as "15, 7 and 5 evaluations"."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last} evaluations" if most else f"{last} evaluation{'s' if last != '1' else ''}"


def _straightness(own: float | None, plain: float | None) -> str:
    if own is None or plain is None:
        return ""
    figures = f"(curvature {number(own, 2)} against {number(plain, 2)})"
    if own < plain:
        return f"; its paths are straighter, {number(plain / max(own, 1e-12), 2)} times {figures}"
    return f"; its paths are not straighter {figures}"


def _figures(rows: Sequence[Line], key: str, nfe: int) -> str:
    shown = [row for row in rows if row["model"] == "student" and row["nfe"] == nfe and row["sampler"] != REFERENCE]
    said = [f"{row['coupling']} {number(row[key], 3)}" for row in shown]
    said += [f"{title(row)} {number(row[key], 3)}" for row in rows if row["model"] == "teacher"]
    for row in rows:
        if row["model"] == "floor":
            spread = f" ± {number(row['spread'], 2)}" if row.get("spread") else ""
            said.append(f"real images, the floor, {number(row[key], 3)}{spread}")
    sampler = f" ({str(shown[0]['sampler']).capitalize()})" if shown else ""
    return f"{DISTANCE[key]} at {_evaluations([nfe])}{sampler}, lower is better: {'; '.join(said)}."


def title(line: Line) -> str:
    """The name of a row on the page."""
    if line["model"] == "student":
        return f"{line['coupling']} student, {str(line['sampler']).capitalize()}, NFE {line['nfe']}"
    sampler = f", {line['sampler']}" if line.get("sampler") else ""
    guidance = f", guidance {line['guidance']:g}" if line.get("guidance") else ""
    return f"{line['model']}{sampler}{guidance}"
