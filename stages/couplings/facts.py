"""The table of couplings: everything that the rest of the program needs to know about each.

A new coupling is one record in this table and one file, which `load` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_OWN = "each image is paired once a draw, with its own label"
_NORMAL = "the noise is N(0, I)"
_BY_CLASS = "each class has as many pairs as images"
_LOADERS = "nfm.stages.encoding.coupling"
_RECIPES = "nfm.stages.pairs.recipe"
_ESTIMATES = "nfm.stages.pairs.estimate"


@dataclass(frozen=True)
class CouplingFacts:
    """What is true of a coupling by construction, and how its pairs are made.

    `noise`: "eps" is drawn for each record; "dealt" is drawn for a group of minibatch OT and assigned within it; "made"
    is computed from the image. `image`: the "row" of the slot, a row "chosen" for the noise, or "generated" from it.

    Functions are named as `module:function` and imported when they are called, since they import torch:
    `load(spec, source, setup)` gives the coupling (see `trainers.couplings.coupling.Coupling`), `recorded(config,
    sha256)` what else decides the pairs, for the recipe, `flops(config, facts)` the arithmetic of one pair, and
    `timed(config, facts)` the pairs a second of one worker here (see `pairs.estimate.Worker`).
    """

    noise: Literal["eps", "dealt", "made"]
    image: Literal["row", "chosen", "generated"]
    exact: tuple[str, ...]
    approximate: tuple[str, ...] = ()
    load: str = ""
    made_with: Literal["teacher", "potential", "student"] | None = None  # the artifact that it needs besides the data
    code: bool = False  # whether the user's function in `pairs.custom` makes the noise
    options: tuple[str, ...] = ()  # the fields of [pairs] that only this coupling uses
    recorded: str | None = None
    flops: str | None = None
    timed: str | None = None
    untimed: str = ""  # what decides the time of a coupling that is not timed
    colours: tuple[str, str] | None = None  # of its lines, on a light and on a dark page

    @property
    def gaussian(self) -> bool:
        """Whether the noise is drawn from the seed, exactly N(0, I), so that codec `seeded` can make it again."""
        return self.noise != "made"


FACTS = {
    "nfm": CouplingFacts(
        "made", "row", (_OWN,), ("the noise is N(0, I) as far as the teacher fits the data",),
        load=f"{_LOADERS}:load_nfm", made_with="teacher", flops=f"{_RECIPES}:nfm_flops",
        timed=f"{_ESTIMATES}:nfm_worker", colours=("#2566d8", "#6aa3ff"),
    ),
    "independent": CouplingFacts(
        "eps", "row", ("the noise is N(0, I), whatever the image", _OWN),
        load=f"{_LOADERS}:load_independent", untimed="nothing is computed, and the disk decides",
        colours=("#d4711c", "#f2a35c"),
    ),
    "minibatch-ot": CouplingFacts(
        "dealt", "row", (_NORMAL, _OWN),
        ("the transport is optimal within groups of one class and shard, not over the data",),
        load=f"{_LOADERS}:load_minibatch_ot", options=("group_size",),
        recorded=f"{_RECIPES}:minibatch_ot_options", flops=f"{_RECIPES}:minibatch_ot_flops",
        untimed="the assignment decides, which takes the cube of pairs.group_size",
        colours=("#8e44ad", "#c58be0"),
    ),
    "semidiscrete-ot": CouplingFacts(
        "eps", "chosen", (_NORMAL, _BY_CLASS),
        ("how often an image is paired, as far as the potential was fitted",),
        load=f"{_LOADERS}:load_semidiscrete_ot", made_with="potential", flops=f"{_RECIPES}:semidiscrete_ot_flops",
        untimed="the images of a class are read for every batch, and how fast decides",
        colours=("#0f8a9d", "#58c7d8"),
    ),
    "reflow": CouplingFacts(
        "eps", "generated", (_NORMAL, _BY_CLASS), ("the images are a student's samples, not the data's",),
        load=f"{_LOADERS}:load_reflow", made_with="student",
        options=("reflow_of", "student", "reflow_solver", "reflow_nfe", "reflow_grid", "reflow_guidance"),
        recorded=f"{_RECIPES}:reflow_options", flops=f"{_RECIPES}:reflow_flops",
        timed=f"{_ESTIMATES}:reflow_worker", colours=("#c0396b", "#f07aa6"),
    ),
    "custom": CouplingFacts(
        "made", "row", (_OWN,), ("whatever the function makes of the noise; the two-sample AUC tells",),
        load=f"{_LOADERS}:load_custom", code=True, options=("custom",), recorded=f"{_RECIPES}:custom_options",
        untimed="your function decides",
        colours=("#8a6d1d", "#d6b65c"),
    ),
}  # fmt: skip
UNKNOWN = CouplingFacts("made", "row", ())
SPARE = (("#4d7c0f", "#a3d65c"), ("#7a4b3a", "#d9a28c"), ("#3b4a9e", "#9aa8f0"), ("#a3195b", "#ff8fc0"))


def facts_of(coupling: str) -> CouplingFacts:
    """The facts of a coupling. For an unknown one, nothing is assumed."""
    return FACTS.get(coupling, UNKNOWN)


def colours_of(coupling: str) -> tuple[str, str]:
    """The colours of its lines on a light and on a dark page. A coupling without its own gets a spare one."""
    if (own := facts_of(coupling).colours) is not None:
        return own
    without = [name for name, facts in FACTS.items() if facts.colours is None]
    return SPARE[without.index(coupling) % len(SPARE) if coupling in without else 0]
