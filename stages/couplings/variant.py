"""What a student trains on: a coupling, softened, mixed with others or permuted by the reader; one word names it.

`nfm`, `nfm:soften=0.5`, `nfm:independent=0.2` (a fifth of the pairs from the independent store), `nfm:permuted`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nfm.stages.couplings.facts import FACTS

LEAST, MOST = 0.0001, 0.9999  # a share that a mixture can deal out; beyond, a variant is another one in all but name


@dataclass(frozen=True)
class Variant:
    """A coupling's store and the reader's knobs; `mixture` gives the shares of other couplings' stores."""

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
        """The variant of that spelling. Raises ValueError, which says what is wrong with it."""
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
        _known([coupling])  # not of a store at hand: anybody may write one, of a coupling of her own
        soften = knobs.pop("soften", 0.0)
        return cls(coupling, soften, "permuted" in options, knobs)

    def __str__(self) -> str:
        options = [f"soften={self.soften!r}"] if self.soften else []
        options += ["permuted"] if self.permuted else []
        options += [f"{name}={share!r}" for name, share in sorted(self.mixture.items())]
        return ":".join([self.coupling, *options])


def check_knobs(soften: float, mixture: Mapping[str, float]) -> None:
    """What holds of a reader's knobs whatever store it reads. Raises ValueError with the value and the remedy."""
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
