"""What the solvers cost: evaluations of the velocity an interval. It imports no torch, so that a config can be checked.

The solvers themselves, by the same names, are in `solvers`.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """A solver's cost: NFE = per_interval * N - saved, as `spelled` for people."""

    per_interval: int
    saved: int
    spelled: str


COSTS = {
    "euler": Cost(1, 0, "N evaluations"),
    "heun": Cost(2, 1, "2N - 1 evaluations, an odd number"),
    "midpoint": Cost(2, 0, "2N evaluations"),
    "rk4": Cost(4, 0, "4N evaluations"),
}
GRIDS = ("uniform", "square")  # of times: t = u or t = u^2
EULER_UP_TO = 5  # evaluations; Heun above


def pick_solver(solver: str, nfe: int) -> str:
    """`auto` is Euler up to 5 evaluations and Heun above. Raises ValueError for an NFE that the solver cannot have."""
    picked = ("euler" if nfe <= EULER_UP_TO else "heun") if solver == "auto" else solver
    intervals(picked, nfe)
    return picked


def intervals(solver: str, nfe: int) -> int:
    """The number of intervals N for which that solver takes `nfe` evaluations.

    Raises ValueError for an unknown solver, and for an NFE that it cannot have, naming the nearest that it can.
    """
    if solver not in COSTS:
        raise ValueError(f"solver = {solver!r} is unknown; there are {', '.join(COSTS)}")
    per_interval, saved, spelled = COSTS[solver]
    fewer = (nfe + saved) // per_interval
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: {solver} needs {per_interval - saved} evaluations or more")
    if per_interval * fewer - saved != nfe:
        nearest = [str(per_interval * count - saved) for count in (fewer, fewer + 1) if count > 0]
        raise ValueError(f"nfe = {nfe}: {solver} takes {spelled}; use {' or '.join(nearest)}")
    return fewer
