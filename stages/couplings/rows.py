"""Whether the slots of a store are the rows of its source."""

from __future__ import annotations

from nfm.stages.couplings.facts import facts_of
from nfm.storage import StoreSpec


def slot_is_row(spec: StoreSpec) -> bool:
    """Whether slot s belongs to source row s. A generated image has the label of that row.

    For an unknown coupling this cannot be known. A store with noise dealt in groups, whose recipe does not say how, was
    made by another program, which may have chosen rows.
    """
    facts = facts_of(spec.coupling)
    if facts.noise == "dealt" and spec.coupling_options is None:
        return False
    return bool(facts.exact) and facts.image != "chosen"
