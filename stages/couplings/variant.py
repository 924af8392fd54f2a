"""What a student trains on: a coupling, which the reader may soften, mix with others or permute. One word names it.

`nfm`, `nfm:soften=0.5`, `nfm:independent=0.2` (a fifth of the pairs from the independent store), `nfm:permuted`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nfm.stages.couplings.facts import FACTS

LEAST, MOST = 0.0001, 0.9999  # the smallest and the largest share of a mixture


@dataclass(frozen=True)
class Variant:
    """A coupling with the options of its reader. `mixture` gives the shares of the stores of other couplings."""

    coupling: str
    soften: float = 0.0
    permuted: bool = False
    mixture: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check_knobs(self.soften, self.mixture)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None
        if self.coupling in self.mixture:
            raise ValueError(f"{self}: {self.coupling} is mixed with itself; name the shares of other couplings")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant that a text names. Raises ValueError, which says what is wrong with it."""
        coupling, *options = text.strip().split(":")
        knobs: dict[str, float] = {}
        for option in options:
            name, sign, value = option.partition("=")
            if option == "permuted":
                continue
            if name in knobs:
                raise ValueError(f"{text!r}: {name} is given twice; once is enough")
            try:
                number = float(value)
            except ValueError:
                number = float("nan")
            if not sign or math.isnan(number):
                raise ValueError(f"{text!r}: {option!r} is no option; write soften=0.5, permuted or COUPLING=0.2")
            knobs[name] = number
        _known([coupling])  # not checked for an existing store, which may have any user's coupling
        soften = knobs.pop("soften", 0.0)
        return cls(coupling, soften, "permuted" in options, knobs)

    def __str__(self) -> str:
        options = [f"soften={self.soften!r}"] if self.soften else []
        options += ["permuted"] if self.permuted else []
        options += [f"{name}={share!r}" for name, share in sorted(self.mixture.items())]
        return ":".join([self.coupling, *options])


def check_knobs(soften: float, mixture: Mapping[str, float]) -> None:
    """Checks the reader's options, for any store. Raises ValueError with the value and the remedy."""
    _known(mixture)
    if not 0 <= soften <= MOST:
        raise ValueError(f"soften is {soften}, it lies in [0, {MOST}]; near 1 the pairs are independent")
    if not (min(mixture.values(), default=1) >= LEAST and sum(mixture.values()) <= MOST):
        told = ", ".join(f"{name} {share}" for name, share in mixture.items())
        raise ValueError(
            f"shares ({told}) are above 0, at least {LEAST}, and together below 1, at most {MOST}; what is left is the "
            "share of the store itself"
        )


def _known(couplings: Iterable[str]) -> None:
    for name in couplings:
        if name not in FACTS:
            raise ValueError(f"coupling {name!r} is unknown; there are {', '.join(FACTS)}")
