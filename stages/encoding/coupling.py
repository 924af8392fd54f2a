"""Loads the coupling that a store's recipe names, and checks that its inputs are the ones in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfm.stages.base import StageError, call
from nfm.stages.couplings import custom
from nfm.stages.couplings.facts import facts_of
from nfm.stages.encoding.setup import Setup
from nfm.stages.trained.devices.precision import autocast_dtype
from nfm.stages.trained.weights import WEIGHTS
from nfm.storage import ImageDataset
from nfm.storage.files import atomic
from nfm.storage.files.paths import inside
from nfm.storage.format.spec import StoreSpec

if TYPE_CHECKING:
    from nfm.trainers.couplings.coupling import NFM, Coupling


def load_coupling(spec: StoreSpec, source: ImageDataset, setup: Setup) -> Coupling:
    """The coupling of a store, on the device of `setup`.

    Raises StageError if its teacher, potential or code is another one.
    """
    if not (load := facts_of(spec.coupling).load):
        raise StageError(f"{setup.store}: coupling {spec.coupling!r} is not known here; install a newer nfm-pairs")
    loaded: Coupling = call(load, spec, source, setup)
    return loaded


def of_shard(coupling: Coupling, draw: int, shard: int) -> Coupling:
    """The coupling for one shard: a custom coupling gets the random numbers of this shard."""
    from nfm.trainers.couplings.coupling import Custom

    return coupling.at(draw, shard) if isinstance(coupling, Custom) else coupling


def as_teacher(coupling: Coupling) -> NFM | None:
    """The coupling if it uses a teacher, else None."""
    from nfm.trainers.couplings.coupling import NFM

    return coupling if isinstance(coupling, NFM) else None


def load_independent(spec: StoreSpec, source: ImageDataset, setup: Setup) -> Coupling:
    from nfm.trainers.couplings.coupling import Independent

    return Independent()


def load_minibatch_ot(spec: StoreSpec, source: ImageDataset, setup: Setup) -> Coupling:
    from nfm.trainers.couplings.minibatch_ot import MinibatchOT

    return MinibatchOT(_options(spec)["group_size"])


def load_semidiscrete_ot(spec: StoreSpec, source: ImageDataset, setup: Setup) -> Coupling:
    from nfm.stages.trained import potential

    return potential.load_coupling(_checked(setup, spec.potential, "potential"), source, setup.device)


def load_custom(spec: StoreSpec, source: ImageDataset, setup: Setup) -> Coupling:
    from nfm.trainers.couplings.coupling import Custom

    options = _options(spec)
    named = options["function"]
    function = custom.load(Path(setup.maker or ""), named, options["sha256"])
    return Custom(function, f"pairs.custom = {named!r}:", lambda draw, shard: custom.rng(spec.seed, draw, shard))


def load_nfm(spec: StoreSpec, source: ImageDataset, setup: Setup) -> Coupling:
    from nfm.stages.trained import teacher
    from nfm.trainers.couplings.coupling import NFM

    weights = Path(setup.teacher or "") / WEIGHTS
    if atomic.hash_file(weights)[0] != setup.teacher_sha256:
        raise StageError(
            f"{weights}: not the weights that its manifest lists; run `nfm audit` on that teacher, then restore it or "
            "train it again"
        )
    model, facts = teacher.load(weights.parent, setup.device)
    if setup.compile:
        model.compile(dynamic=False)  # all batches of a store have the same shape
    return NFM(
        model, facts["eta"], facts["sigma_f"], setup.device, autocast_dtype(setup.precision), setup.precision == "tf32"
    )


def load_reflow(spec: StoreSpec, source: ImageDataset, setup: Setup) -> Coupling:
    """The samples of a trained student, by the solver in the recipe."""
    from nfm.stages.trained.sampling import student_sampler
    from nfm.trainers.couplings.coupling import Generated

    folder = _checked(setup, spec.student, "student")
    options = _options(spec)
    how = {name: options[name] for name in ("solver", "grid", "guidance")}
    sampler = student_sampler(folder, options["nfe"], setup.device, setup.precision, **how)
    return Generated(sampler.decode, setup.device)


def _options(spec: StoreSpec) -> dict[str, Any]:
    return dict(spec.coupling_options or {})


def _checked(setup: Setup, content: str | None, kind: str) -> Path:
    """The folder that the pairs are made with, after checking that its files are the ones in the recipe."""
    folder = Path(setup.maker or "")
    manifest = atomic.read_json(folder / "manifest.json")
    if manifest["content_digest"] != content:
        raise StageError(
            f"{folder}: {kind} {manifest['content_digest'][:12]}, but {setup.store} is made with {str(content)[:12]}; "
            "name that one, or make a store of its own from this one"
        )
    for file in manifest["files"]:
        if file["payload"] and atomic.hash_file(inside(folder, file["path"]))[0] != file["sha256"]:
            raise StageError(
                f"{folder / file['path']}: not the file that its manifest lists; run `nfm audit` on that {kind}, then "
                "restore it or make it again"
            )
    return folder
