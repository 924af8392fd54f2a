"""What a student trains on: a coupling, softened, mixed with others or permuted by the reader; one word names it.

`nfm`, `nfm:soften=0.5`, `nfm:independent=0.2` (a fifth of the pairs from the independent store), `nfm:permuted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

COUPLINGS = ("independent", "minibatch-ot", "semidiscrete-ot", "nfm", "custom", "reflow")


@dataclass(frozen=True)
class Variant:
    """A coupling's store and the reader's knobs; `mixture` gives the shares of other couplings' stores."""

    coupling: str
    soften: float = 0.0
    permuted: bool = False
    mixture: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.coupling, *self.mixture):
            if name not in COUPLINGS:
                raise ValueError(f"coupling {name!r} is unknown; there are {', '.join(COUPLINGS)}")
        if not 0 <= self.soften < 1:
            raise ValueError(f"{self}: soften is {self.soften}, it lies in [0, 1); near 1 the pairs are independent")
        if self.coupling in self.mixture:
            raise ValueError(f"{self}: {self.coupling} is mixed with itself; name the shares of other couplings")
        if min(self.mixture.values(), default=1) <= 0 or sum(self.mixture.values()) >= 1:
            raise ValueError(f"{self}: shares are above 0 and together below 1; what is left is {self.coupling}'s")

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant of that spelling. Raises ValueError, which says what is wrong with it."""
        coupling, *options = text.strip().split(":")
        knobs: dict[str, float] = {}
        for option in options:
            name, sign, value = option.partition("=")
            if option == "permuted":
                continue
            try:
                number = float(value)
            except ValueError:
                number = float("nan")
            if name in knobs or not sign or not number == number:
                raise ValueError(f"{text!r}: {option!r} is no option; write soften=0.5, permuted or COUPLING=0.2")
            knobs[name] = number
        soften = knobs.pop("soften", 0.0)
        return cls(coupling, soften, "permuted" in options, knobs)

    def __str__(self) -> str:
        options = [f"soften={self.soften:g}"] if self.soften else []
        options += ["permuted"] if self.permuted else []
        options += [f"{name}={share:g}" for name, share in sorted(self.mixture.items())]
        return ":".join([self.coupling, *options])
