"""The audit of a pair store beyond its own files: does it fit its source, and do its pairs fit its coupling?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from nfm.stages.base import Finding, Inputs, StageError
from nfm.stages.couplings import custom
from nfm.stages.couplings.facts import facts_of
from nfm.stages.encoding.encoder import Encoder
from nfm.stages.encoding.setup import Setup
from nfm.stages.encoding.threads import threads
from nfm.stages.pairs import stage
from nfm.stages.pairs.coupling_advice import better_teacher
from nfm.stages.stores import against_source as pairs_source
from nfm.stages.stores.repair import pinned, verify
from nfm.storage import ImageDataset, PairStore, layouts
from nfm.storage.files import atomic
from nfm.storage.files.parallel import parallel
from nfm.storage.format import codecs
from nfm.storage.format.spec import StoreSpec, parse_name, read_spec, shard_name
from nfm.storage.ledger import seal

MEAN_BOUND, VARIANCE_BOUNDS = 0.1, (0.8, 1.25)
# RMS over a record of the stored noise minus the noise encoded again. A float16 codec rounds to 2^-11 relative; bf16
# products on another device or with another batch size move z by a few hundredths.
NOISE_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
# RMS, in image units, of the decoded stored noise minus x + eta eps'. The flow amplifies rounding. Noise of another
# image decodes to another image, several tenths away.
DECODE_TOLERANCE = {"float32": 0.05, "bfloat16": 0.2}
# RMS, in image units, of a student's image minus the same image generated again. A pixel's step is 0.008.
IMAGE_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
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
        return findings, [] if findings else _made_elsewhere(read_spec(root))
    manifest, found = seal.load(root, generation), read_spec(root)
    config = stage.PairsConfig(**manifest["config"])
    if set(stage.input_roles(config)) - set(inputs):
        return findings, []
    recorded = atomic.read_json(root / "spec.json").get("external", {})
    if stage.recipe(manifest, inputs, found, recorded) != found:
        remedy = "restore spec.json from a copy, or move the store away and make it again"
        findings.append(Finding(str(root / "spec.json"), "its recipe is not the one that its inputs give", remedy))
    findings += against_source(root, manifest, inputs)
    if level == "default" or findings:
        return findings, []
    if facts_of(found.coupling).code and (found.coupling_options or {}).get("sha256") not in allowed.digests:
        return findings, [_not_run(found, allowed)]
    # The pairs are encoded on the device of this machine, wherever they were made.
    try:
        encoder = stage.setup(config.model_copy(update={"device": "auto"}), inputs, root)
        stage.announce(found, encoder, allowed)
        with threads(encoder.threads):
            return encode_again(root, manifest, encoder, sample)
    except (StageError, ValueError) as error:
        if not facts_of(found.coupling).code:
            raise
        remedy = "put the module that made the store on Python's path, its digest stands in spec.json"
        return [Finding(str(root / "spec.json"), f"its pairs cannot be made again: {error}", remedy)], []


def _not_run(spec: StoreSpec, allowed: custom.Allowed) -> str:
    options = spec.coupling_options or {}
    others = ", ".join(sorted(digest[:12] for digest in allowed.digests))
    return (
        f"its pairs were not encoded again: their function {options.get('function')!r} is code, and an audit runs none "
        f"unasked. When you know the file of SHA-256 {options.get('sha256')}, give --run-custom with it, or "
        f"audit with -c CONFIG, the config of yours that names it{f'; allowed were others, {others}' if others else ''}"
    )


def against_source(root: Path, manifest: dict[str, Any], inputs: Inputs) -> list[Finding]:
    """Compares images, labels and image rows of every record with the data artifact, and checks the distribution of z.

    A draw must have the labels of the source's rows, once each: for any coupling, slot s has the label of row s.
    """
    spec, source = read_spec(root), ImageDataset.open(inputs["data"], "train")
    remedy = "its bytes are as committed, so the encoder had other images: move the store away and make it again"
    if spec.rows != len(source):
        problem = f"its draws have {spec.rows} records, the source {len(source)} rows"
        return [Finding(str(root / "spec.json"), problem, "make the store again from this source")]

    def check(entry: dict[str, Any]) -> list[Finding]:
        wrong = pairs_source.problems(root, spec, source, entry, exported="exported" in manifest)
        payload = str(root / layouts.files(spec, entry)[0].path)
        return [Finding(payload, problem, remedy) for problem in wrong]

    findings = [finding for found in parallel(check, manifest["shards"]) for finding in found]
    return findings + _marginals(root, manifest)


def _marginals(root: Path, manifest: dict[str, Any]) -> list[Finding]:
    mean, var = manifest["moments"]["mean"], manifest["moments"]["var"]
    low, high = VARIANCE_BOUNDS
    if abs(mean) <= MEAN_BOUND and low <= var <= high:
        return []
    problem = f"its noise has mean {mean:.3f} and variance {var:.3f}, a student samples from 0 and 1"
    teacher = better_teacher(manifest.get("coupling_report") or {})
    of_teacher = f"{teacher}; sigma_f should be measured on these images"
    remedy = of_teacher if read_spec(root).teacher else "let the coupling's noise be about N(0, 1)"
    return [Finding(str(root), problem, remedy)]


def _made_elsewhere(spec: StoreSpec) -> list[str]:
    origin = (spec.coupling_options or {}).get("origin")
    return [] if origin is None else [f"made elsewhere ({origin}): its pairs are not compared with a source"]


def encode_again(
    root: Path, manifest: dict[str, Any], setup: Setup, count: int, seed: int = 0
) -> tuple[list[Finding], list[str]]:
    """Makes a seeded sample of pairs again, decodes them if there is a teacher, and compares the results.

    The new noise must equal the stored noise, exactly unless a teacher made it. The image of the row, or the image
    generated again, must equal the stored image. flip, group and nll must be those of the index. The stored noise of a
    teacher must decode to x + eta eps' in float32. If none of n is bad, at most 3/n are bad with 95 % confidence (the
    rule of three).
    """
    spec, total = read_spec(root), manifest["records"]
    store, encoder = PairStore.open(root, manifest["generation"]), Encoder(setup)
    picked = _held(spec, manifest, np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    rounding = (spec.noise_step or 0.0) / 12**0.5  # RMS of the rounding error of a step
    findings: list[Finding] = []
    encoded, decoded = [np.zeros(0)], [np.zeros(0)]
    for draw in range(manifest["draws"]):
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
            if not spec.teacher:
                right &= (anew == stored["noise"]).reshape(len(part), -1).all(axis=1)
            right &= encoded[-1] <= NOISE_TOLERANCE[setup.precision] + rounding
            right &= decoded[-1] <= DECODE_TOLERANCE[setup.precision] + AMPLIFIED * rounding
            right &= store.image_rows(draw, part) == again["row"]
            images = (encoder.source.to_float(each["image"]) for each in (stored, again))
            right &= _rms(np.subtract(*images)) <= (IMAGE_TOLERANCE[setup.precision] if spec.student else 0.0)
            findings += [_not_its_noise(root, manifest, draw, int(slot), spec.rows_per_shard) for slot in part[~right]]
    worst, back = np.concatenate(encoded).max(), np.concatenate(decoded).max()
    bound = "see the findings" if findings else f"at most {3 / len(picked):.2%} with 95 % confidence"
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


def _held(spec: StoreSpec, manifest: dict[str, Any], picked: np.ndarray) -> np.ndarray:
    """The numbers of the records that a generation holds, as positions in all draws without the excluded records."""
    places = np.sort(picked)
    for shard in sorted(manifest.get("excluded", ()), key=lambda shard: parse_name(shard["name"])):
        first = parse_name(shard["name"])[0] * spec.rows + shard["slots"][0]
        places[places >= first] += shard["records"]
    return places


def _not_its_noise(root: Path, manifest: dict[str, Any], draw: int, slot: int, rows_per_shard: int) -> Finding:
    name = shard_name(draw, slot // rows_per_shard)
    spec = read_spec(root)
    payload = next(layouts.files(spec, entry)[0].path for entry in manifest["shards"] if entry["name"] == name)
    remedy = "its commit says which device and versions encoded it; move the store away and make it again"
    return Finding(str(root / payload), f"slot {slot} of draw {draw} is not the pair that its coupling makes", remedy)


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(difference.reshape(len(difference), -1)).mean(axis=1))
