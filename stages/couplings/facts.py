"""What holds of each coupling by construction: where its noise and its images come from, what is exact in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_OWN = "each image is paired once a draw, with its own label"
_NORMAL = "the noise is N(0, I)"
_BY_CLASS = "each class has as many pairs as images"


@dataclass(frozen=True)
class CouplingFacts:
    """`noise`: "eps" is drawn for each record, "dealt" is drawn for a group and given out in it, "made" from the image.

    `image`: the "row" of the slot, a row that is "chosen" for the noise, or "generated" from it.
    """

    noise: Literal["eps", "dealt", "made"]
    image: Literal["row", "chosen", "generated"]
    exact: tuple[str, ...]
    approximate: tuple[str, ...] = ()

    @property
    def gaussian(self) -> bool:
        """Whether the noise is N(0, I) as it is made."""
        return self.noise != "made"


FACTS = {
    "independent": CouplingFacts("eps", "row", ("the noise is N(0, I), whatever the image", _OWN)),
    "minibatch-ot": CouplingFacts(
        "dealt", "row", (_NORMAL, _OWN),
        ("the transport is optimal within groups of one class and shard, not over the data",),
    ),
    "semidiscrete-ot": CouplingFacts(
        "eps", "chosen", (_NORMAL, _BY_CLASS),
        ("how often an image is paired, as far as the potential was fitted",),
    ),
    "nfm": CouplingFacts("made", "row", (_OWN,), ("the noise is N(0, I) as far as the teacher fits the data",)),
    "custom": CouplingFacts(
        "made", "row", (_OWN,), ("whatever the function makes of the noise; the two-sample AUC tells",)
    ),
    "reflow": CouplingFacts(
        "eps", "generated", (_NORMAL, _BY_CLASS), ("the images are a student's samples, not the data's",)
    ),
}  # fmt: skip
UNKNOWN = CouplingFacts("made", "row", ())


def facts_of(coupling: str) -> CouplingFacts:
    """Of a coupling that is not known here, nothing is exact."""
    return FACTS.get(coupling, UNKNOWN)
