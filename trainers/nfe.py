"""The cost of solvers: evaluations of the velocity for each interval. It needs no torch, so configs can be checked
fast.

The solvers themselves, with the same names, are in `solvers`.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """The cost of a solver: NFE = per_interval * N - saved. `spelled` is its text for users."""

    per_interval: int
    saved: int
    spelled: str


COSTS = {
    "euler": Cost(1, 0, "N evaluations"),
    "heun": Cost(2, 1, "2N - 1 evaluations, an odd number"),
    "midpoint": Cost(2, 0, "2N evaluations"),
    "rk4": Cost(4, 0, "4N evaluations"),
    "sde-euler": Cost(1, 0, "N evaluations"),
    "sde-heun": Cost(2, 1, "2N - 1 evaluations, an odd number"),
}
STOCHASTIC = ("sde-euler", "sde-heun")  # which add noise on their way
DIFFUSIONS = ("sigma", "constant", "sin^2", "decreasing")  # how much of it
GRIDS = ("uniform", "square")  # of times: t = u or t = u^2
EULER_UP_TO = 5  # evaluations; Heun for more
MOST_NFE = 100_000  # evaluations: far beyond what changes an image


def pick_solver(solver: str, nfe: int) -> str:
    """`auto` is Euler up to 5 evaluations and Heun above. Raises ValueError for an NFE that the solver cannot have."""
    picked = ("euler" if nfe <= EULER_UP_TO else "heun") if solver == "auto" else solver
    intervals(picked, nfe)
    return picked


def intervals(solver: str, nfe: int) -> int:
    """The number of intervals N for which this solver takes `nfe` evaluations.

    Raises ValueError for an unknown solver, and for an NFE that it cannot have; the message names the nearest possible
    one.
    """
    if solver not in COSTS:
        raise ValueError(f"solver = {solver!r} is unknown; there are {', '.join(COSTS)}")
    per_interval, saved, spelled = COSTS[solver]
    fewer = (nfe + saved) // per_interval
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: {solver} needs {per_interval - saved} evaluations or more")
    if nfe > MOST_NFE:
        raise ValueError(f"nfe = {nfe}: at most {MOST_NFE} evaluations; some tens are as good")
    if per_interval * fewer - saved != nfe:
        nearest = [str(per_interval * count - saved) for count in (fewer, fewer + 1) if count > 0]
        raise ValueError(f"nfe = {nfe}: {solver} takes {spelled}; use {' or '.join(nearest)}")
    return fewer
