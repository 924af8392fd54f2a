"""The coupling that a store's recipe names, loaded where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nfm.stages.stage import StageError
from nfm.stages.training import WEIGHTS, Precision, autocast_dtype
from nfm.storage import atomic
from nfm.storage.schema import StoreSpec

if TYPE_CHECKING:
    from nfm.trainers.couplings import NFM, Coupling


def load_coupling(
    spec: StoreSpec, folder: str | None, weights_sha256: str | None, device: str, precision: Precision, compiled: bool
) -> Coupling:
    """The coupling of a store; `folder` is its teacher's. Raises StageError when its weights are not its manifest's."""
    from nfm.trainers.couplings import NFM, Independent

    if spec.coupling == "independent":
        return Independent()
    from nfm.stages import teacher

    weights = Path(folder or "") / WEIGHTS
    if atomic.hash_file(weights)[0] != weights_sha256:
        raise StageError(
            f"{weights}: not the weights that its manifest lists; run `nfm audit` on that teacher, then restore it or "
            "train it again"
        )
    model, facts = teacher.load(weights.parent, device)
    if compiled:
        model.compile(dynamic=False)  # the batch shape is the store's
    return NFM(model, facts["eta"], facts["sigma_f"], device, autocast_dtype(precision))


def as_teacher(coupling: Coupling) -> NFM | None:
    """The coupling, if it is a teacher's."""
    from nfm.trainers.couplings import NFM

    return coupling if isinstance(coupling, NFM) else None
