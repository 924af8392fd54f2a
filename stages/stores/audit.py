"""The audit of a pair store beyond its own files: does it fit its source, and do its pairs fit its coupling?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from nfm.stages.base import Finding, Inputs, StageError, Unfit
from nfm.stages.couplings import custom
from nfm.stages.couplings.facts import facts_of
from nfm.stages.display import units
from nfm.stages.encoding.encoder import Encoder
from nfm.stages.encoding.setup import Setup
from nfm.stages.pairs import stage
from nfm.stages.pairs.coupling_advice import better_teacher
from nfm.stages.stores import against_source as pairs_source
from nfm.stages.stores.repair import pinned, verify
from nfm.stages.trained.devices.machine import pick_device, threads
from nfm.stages.trained.devices.precision import check_precision
from nfm.stages.trained.foreign import own
from nfm.storage import ImageDataset, PairStore, layouts
from nfm.storage.files import atomic
from nfm.storage.files.parallel import parallel
from nfm.storage.format import codecs
from nfm.storage.format.spec import StoreSpec, read_spec
from nfm.storage.ledger import seal
from nfm.storage.ledger.generation import Generation
from nfm.storage.ledger.shard_list import Entry

MEAN_BOUND, VARIANCE_BOUNDS = 0.1, (0.8, 1.25)
# RMS over a record of the stored noise minus the noise encoded again. A float16 codec rounds to 2^-11 relative; bf16
# products on another device or with another batch size move z by a few hundredths. TF32 rounds to 8 times finer steps.
NOISE_TOLERANCE = {"float32": 0.01, "tf32": 0.03, "bfloat16": 0.1}
# RMS, in image units, of the decoded stored noise minus x + eta eps'. The flow amplifies rounding. Noise of another
# image decodes to another image, several tenths away.
DECODE_TOLERANCE = {"float32": 0.05, "tf32": 0.1, "bfloat16": 0.2}
# RMS, in image units, of a student's image minus the same image generated again. A pixel's step is 0.008.
IMAGE_TOLERANCE = {"float32": 0.01, "tf32": 0.03, "bfloat16": 0.1}
_NOT_AGAIN = "its pairs were not encoded again"
AMPLIFIED = 10  # how much the flow may amplify the rounding of an int8 codec, as a factor


def audit(
    inputs: Inputs,
    store: Path,
    level: Literal["quick", "default", "deep"],
    sample: int,
    allowed: custom.Allowed = custom.NOBODYS,
) -> tuple[list[Finding], list[str]]:
    """Checks the store itself; its recipe, keys, labels and images against its inputs; and at `deep` makes pairs again.

    `inputs` are the existing ones. Checks that need a missing input are skipped, as its absence is already a finding. A
    custom function is code that the store only names. It runs only if `allowed` has its digest; otherwise a statement
    says that it did not.
    """
    findings = verify(store, level)
    root, generation = pinned(store)
    if level == "quick" or findings or "data" not in inputs:
        return findings, _held_up(level) if findings else _made_elsewhere(read_spec(root))
    sealed = seal.load(root, generation)
    found, manifest = sealed.spec, sealed.body
    if "config" not in manifest:
        return findings, ["its manifest does not say how its pairs were made: they are not compared with a source"]
    config = stage.PairsConfig(**manifest["config"])
    if set(stage.input_roles(config)) - set(inputs):
        return findings, []
    recorded = atomic.read_json(root / "spec.json").get("external", {})
    if stage.recipe(manifest, inputs, found, recorded) != found:
        remedy = "restore spec.json from a copy, or move the store away and make it again"
        findings.append(Finding(str(root / "spec.json"), "its recipe is not the one that its inputs give", remedy))
    findings += against_source(sealed, inputs)
    quality = _marginals(sealed)  # says how good the pairs are, not whether they are those that were made
    if level == "default" or findings:
        return findings + quality, _held_up(level) if findings else []
    findings, said = _made_again(sealed, config, inputs, sample, allowed)
    return quality + findings, said


def _made_again(
    sealed: Generation, config: stage.PairsConfig, inputs: Inputs, sample: int, allowed: custom.Allowed
) -> tuple[list[Finding], list[str]]:
    """Encodes a sample again with what made the store, unless that is code which may not run."""
    root, found = sealed.root, sealed.spec
    if facts_of(found.coupling).code and (found.coupling_options or {}).get("sha256") not in allowed.digests:
        options = found.coupling_options or {}
        told = str(options.get("function")), str(options.get("sha256"))
        return [], [custom.not_run(_NOT_AGAIN, *told, allowed)]
    for maker in sorted({"teacher", "student"} & inputs.keys()):
        for function, sha256 in own.recorded(inputs[maker], maker).values():
            if sha256 not in allowed.digests:
                return [], [custom.not_run(_NOT_AGAIN, function, sha256, allowed)]
    # Wherever the pairs were encoded, the device that is here encodes them again.
    try:
        encoder = stage.setup(config.model_copy(update={"device": "auto"}), inputs, root)
        stage.announce(found, encoder, allowed)
        with threads(encoder.threads):
            return encode_again(sealed, encoder, sample)
    except (StageError, ValueError) as error:
        if not facts_of(found.coupling).code:
            raise
        remedy = "put the module that made the store on Python's path, its digest stands in spec.json"
        return [Finding(str(root / "spec.json"), f"its pairs cannot be made again: {error}", remedy)], []


def _held_up(level: str) -> list[str]:
    return [f"{_NOT_AGAIN}: mend the findings first"] if level == "deep" else []


def against_source(sealed: Generation, inputs: Inputs) -> list[Finding]:
    """Compares images, labels and image rows of every record with the data artifact.

    A draw must have the labels of the source's rows, once each: for any coupling, slot s has the label of row s.
    """
    root, spec, source = sealed.root, sealed.spec, ImageDataset.open(inputs["data"], "train")
    remedy = "its bytes are as committed, so the encoder had other images: move the store away and make it again"
    if spec.rows != len(source):
        problem = f"its draws have {spec.rows} records, the source {len(source)} rows"
        return [Finding(str(root / "spec.json"), problem, "make the store again from this source")]

    def check(entry: Entry) -> list[Finding]:
        wrong = pairs_source.problems(root, spec, source, entry, exported="exported" in sealed.body)
        payload = str(root / layouts.files(spec, entry)[0].path)
        return [Finding(payload, problem, remedy) for problem in wrong]

    return [finding for found in parallel(check, sealed.shards) for finding in found]


def _marginals(sealed: Generation) -> list[Finding]:
    mean, var = sealed.body["moments"]["mean"], sealed.body["moments"]["var"]
    low, high = VARIANCE_BOUNDS
    if abs(mean) <= MEAN_BOUND and low <= var <= high:
        return []
    problem = f"its noise has mean {mean:.3f} and variance {var:.3f}, a student samples from 0 and 1"
    teacher = better_teacher(sealed.body.get("coupling_report") or {})
    of_teacher = f"{teacher}; sigma_f should be measured on these images"
    remedy = of_teacher if sealed.spec.teacher else "let the coupling's noise be about N(0, 1)"
    return [Finding(str(sealed.root), problem, remedy)]


def _made_elsewhere(spec: StoreSpec) -> list[str]:
    origin = (spec.coupling_options or {}).get("origin")
    return [] if origin is None else [f"made elsewhere ({origin}): its pairs are not compared with a source"]


def encode_again(sealed: Generation, setup: Setup, count: int, seed: int = 0) -> tuple[list[Finding], list[str]]:
    """Makes a seeded sample of pairs again, decodes them if there is a teacher, and compares the results.

    The new noise must equal the stored noise, exactly unless a teacher made it or an export rounded it twice. The image
    of the row, or the image generated again, must equal the stored image. flip, group and nll must be those of the
    index. The stored noise of a teacher must decode to x + eta eps' in float32.
    """
    spec, total = sealed.spec, sealed.records
    try:
        check_precision(pick_device(setup.device), setup.precision)
    except Unfit:  # a device that computes more exactly, within the same tolerance
        encoder = Encoder(replace(setup, precision="float32"))
    else:
        encoder = Encoder(setup)
    store, exported = PairStore(sealed), "exported" in sealed.body
    picked = _held(sealed, np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    rounding = (spec.noise_step or 0.0) / 12**0.5  # RMS of the rounding error of a step
    findings: list[Finding] = []
    encoded, decoded = [np.zeros(0)], [np.zeros(0)]
    for draw in range(sealed.draws):
        slots = np.sort(picked[picked // spec.rows == draw] % spec.rows)
        if not len(slots):
            continue
        index = store.index(["slot", "flip", "group", "nll"], draw)
        listed = {name: index[name].to_numpy(zero_copy_only=False) for name in index.column_names}
        order = np.argsort(listed["slot"])
        for part in np.split(slots, range(setup.batch_size, len(slots), setup.batch_size)):
            stored, again = store.gather(draw, part), encoder.encode_slots(draw, part)
            noise = codecs.unpack(stored["noise"], spec.noise_step)
            anew, _ = codecs.pack(again["noise"], spec.codec, spec.noise_step)
            encoded.append(_rms(codecs.unpack(anew, spec.noise_step) - noise))
            decoded.append(encoder.decode_error(draw, part, noise) if spec.teacher else np.zeros(len(part)))
            right = _same_columns(listed, order[np.searchsorted(listed["slot"], part, sorter=order)], again, setup)
            if not (spec.teacher or exported):
                right &= (anew == stored["noise"]).reshape(len(part), -1).all(axis=1)
            right &= encoded[-1] <= NOISE_TOLERANCE[setup.precision] + rounding
            right &= decoded[-1] <= DECODE_TOLERANCE[setup.precision] + AMPLIFIED * rounding
            right &= store.image_rows(draw, part) == again["row"]
            images = (encoder.source.to_float(each["image"]) for each in (stored, again))
            right &= _rms(np.subtract(*images)) <= (IMAGE_TOLERANCE[setup.precision] if spec.student else 0.0)
            findings += [_not_its_noise(sealed, draw, int(slot)) for slot in part[~right]]
    worst, back = np.concatenate(encoded).max(), np.concatenate(decoded).max()
    bound = units.at_most(len(findings), len(picked))
    said = f"{len(findings)} of {len(picked)} pairs bad: {bound}; encoded again within {worst:.2g} (RMS, worst record)"
    if spec.teacher:
        said += f", stored noise decoded in float32 within {back:.2g} of x + eta eps'"
    return findings, [said]


def _same_columns(
    listed: dict[str, np.ndarray], places: np.ndarray, again: dict[str, np.ndarray], setup: Setup
) -> np.ndarray:
    """bool [n]: whether the index has the same values at these places. nll may differ as much as the noise."""
    same = (listed["flip"][places] == again["flip"]) & (listed["group"][places] == again["group"])
    return same & np.isclose(listed["nll"][places], again["nll"], 0, NOISE_TOLERANCE[setup.precision], equal_nan=True)


def _held(sealed: Generation, picked: np.ndarray) -> np.ndarray:
    """The numbers of the records that a generation holds, as positions in all draws without the excluded records."""
    places = np.sort(picked)
    for hole in sorted(sealed.excluded, key=lambda hole: hole.name):
        places[places >= hole.draw * sealed.spec.rows + hole.slots.start] += len(hole.slots)
    return places


def _not_its_noise(sealed: Generation, draw: int, slot: int) -> Finding:
    payload = layouts.files(sealed.spec, sealed.of(draw)[slot // sealed.spec.rows_per_shard])[0].path
    remedy = "its commit says which device and versions encoded it; move the store away and make it again"
    return Finding(
        str(sealed.root / payload), f"slot {slot} of draw {draw} is not the pair that its coupling makes", remedy
    )


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(difference.reshape(len(difference), -1)).mean(axis=1))
