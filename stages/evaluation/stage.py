"""The evaluation: distances of samples to the training set, speeds and curvature, and the floor.

Distances use the features of this run's own classifier (stage `features`), and are then never called FID; or those of
Inception-v3 (FID); or no features, for images of few values (exact W2). A row is written when it is measured, so that a
stopped evaluation continues with the next row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nfm.stages.base import (
    Inputs,
    Reporter,
    Result,
    StageError,
    Stopped,
    Unfit,
)
from nfm.stages.evaluation.config import CURVATURE_STEPS, SPEEDS, EvaluateConfig
from nfm.stages.evaluation.inception import (
    WEIGHTS,
    find_weights,
    statistics,
    statistics_sha256,
    weights_sha256,
)
from nfm.stages.evaluation.table import DISTANCE, as_text, distance_key, published_key
from nfm.stages.trained import student
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.devices.machine import pick_device
from nfm.stages.trained.devices.precision import check_precision
from nfm.stages.trained.devices.timing import Clock
from nfm.stages.trained.foreign import own, vae
from nfm.stages.trained.sampling import (
    Sampler,
    evaluations_per_second,
    find_reference_solver,
    has_own_sampler,
    in_pixels,
    own_sampler,
    reference_sampler,
    student_sampler,
    teacher_sampler,
)
from nfm.storage.files import atomic
from nfm.trainers.nfe import STOCHASTIC

if TYPE_CHECKING:
    from pathlib import Path

NAME = "evaluate"
VERSION = 2
ALONE = True  # its speeds are of a machine that does nothing else
TABLE, TEXT, DISTANCES, ROWS, SAMPLES = "evaluation.json", "evaluation.txt", "distances.json", "rows", "samples"
OF_THE_MOMENT = (*SPEEDS, "machine")  # columns that depend on the machine and the time: never in the content digest


def external(config: EvaluateConfig) -> dict[str, str]:
    """What decides the result but is neither config nor artifact: SHA-256 of Inception's weights and statistics."""
    if config.features != "inception":
        return {}
    statistics = {} if config.statistics is None else {"statistics": statistics_sha256(config.statistics)}
    return {"inception_weights": weights_sha256(config.inception_weights), **statistics}


def check(config: EvaluateConfig) -> None:
    """Raises StageError for anything missing on this machine, before days of training."""
    if config.features == "inception":
        find_weights(config.inception_weights)
    if config.statistics is not None:
        statistics(config.statistics)
    if config.reference:
        find_reference_solver()


def run(config: EvaluateConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Measures every sampler against the training set and writes the table as JSON and text.

    Every row has the same number of images: `samples`, or the number of held-out images, which is then told. The bias
    of distances depends on it.
    """
    from nfm.stages.evaluation.rows import Bench

    device = pick_device(config.device)
    bench = Bench(config, inputs, out, device, report)
    bench.check()
    check(config)
    cut = config.cut(len(bench.heldout), len(bench.source))
    for said in cut:
        report.say(said)
    if config.statistics is not None:
        report.say(_of_published(config, bench.count))
    for variant in config.baselines:
        if f"student:{variant}" not in inputs:
            report.say(f"evaluate.baselines names {variant}, which is the run's own student: it has one row")
    for role in ("teacher", *_students(inputs)):
        if role in inputs:
            own.announce_made(inputs[role], role.partition(":")[0], report.say)
    with_paths = [role for role in _students(inputs) if not has_own_sampler(inputs[role])]
    if len(with_paths) < len(_students(inputs)):
        report.say("a student with its own sampler has one row: evaluate.nfe, solver, grid and diffusion do not apply")
    if "latents" in inputs:
        vae.announce(vae.read_facts(inputs["latents"]).vae, report.say)
    decoder = vae.of_artifact(inputs["latents"], device)[0].decode if "latents" in inputs else None
    samplers = [in_pixels(sampler, decoder) for sampler in _samplers(config, inputs, device)]
    pictures = [f"{SAMPLES}/{sampler.name}.npz" for sampler in samplers]
    if len(set(pictures)) < len(pictures):
        raise StageError(f"two students are of one variant: {', '.join(s.name for s in samplers)}; evaluate them apart")
    measures: dict[str, Callable[[], dict[str, Any]]] = {"floor": bench.floor}
    measures |= {s.name: partial(bench.sampler, s, out / picture) for s, picture in zip(samplers, pictures)}
    measures |= {f"curvature-{role}": partial(bench.curvature, role) for role in with_paths}

    measured = []
    for number, (name, measure) in enumerate(measures.items()):
        if report.stopping:
            raise Stopped
        path = out / ROWS / f"{name}.json"
        if not path.exists():
            atomic.write_json(path, measure())
        row = atomic.read_json(path)
        del row["digest"]
        measured.append(row)
        report.say(f"{number + 1} of {len(measures)}, {_line(row)}")

    body: dict[str, Any] = {
        "rows": [row for row in measured if "value" not in row],
        "curvature": [row for row in measured if "value" in row],
        "machine": "; ".join(sorted({row["machine"] for row in measured if "machine" in row})) or bench.machine,
        "reference": {"rows": len(bench.source), "split": "train"},
        "solver": _solver(config),
        "cut": cut,
    }
    bare = [{key: value for key, value in row.items() if key not in OF_THE_MOMENT} for row in body["rows"]]
    atomic.write_json(out / DISTANCES, {"rows": bare, "curvature": body["curvature"], "reference": body["reference"]})
    atomic.write_json(out / TABLE, body)
    atomic.write_bytes(out / TEXT, as_text(body).encode())
    report.say(f"\n{as_text(body)}")
    key = distance_key(config)
    figures = {f"{DISTANCE[key]} {row['name']}": row[key] for row in body["rows"]}
    return Result(payload=[DISTANCES], metrics=figures, files=[TABLE, TEXT, *pictures])


def cost(config: EvaluateConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What the samples and the curvature of the students take; their number is that of the roles in `inputs`."""
    students = len(_students(facts["inputs"]))
    heldout, train = facts.get("heldout", config.samples), facts.get("images", config.samples)
    count = config.count(heldout)
    shape, guidance = facts["image_shape"], config.student_guidance
    each = count * sum(config.nfe) + sum(2 * batch * nfe for batch in config.speed_batches for nfe in config.nfe)
    evaluations = students * ((2 if guidance else 1) * each + CURVATURE_STEPS * config.curvature_trajectories)
    left_out = ["distances", *(["the teacher's samples"] if "teacher" in facts["inputs"] else [])]
    words = f"without {' and '.join(left_out)}"
    told = "; ".join(config.cut(heldout, train))
    if facts["student"].model is not None or facts["student"].sampler is not None:  # a plan runs nobody's code
        return Cost(count, "samples a row", told, unknown=own.UNKNOWN_COST)
    one = student.flops(facts["student"], shape)
    cost = Cost(count, "samples a row", told, flops=evaluations * one, unknown=words)
    if clock is None or not students:
        return cost
    try:
        device = pick_device(config.device)
        check_precision(device, config.precision)
    except Unfit as error:
        return replace(cost, unknown=f"no time ({error})")
    sizes = {"flops": one, "batch_size": config.batch_size, "device": device, "shape": shape}
    rate = clock.measured(
        "the velocity of the student", config.precision, sizes,
        lambda: evaluations_per_second(facts["student"], facts, device, config.precision, config.batch_size, 0.0),
    )  # fmt: skip
    return replace(cost, seconds=evaluations / rate)


def _samplers(config: EvaluateConfig, inputs: Inputs, device: str) -> Iterator[Sampler]:
    if "teacher" in inputs:
        for guidance in sorted({0.0, config.guidance}, key=bool):
            for score in (False, True):
                yield teacher_sampler(inputs["teacher"], guidance, score, device, config.precision)
    for role in _students(inputs):
        if has_own_sampler(inputs[role]):
            yield own_sampler(inputs[role], device, config.precision, config.student_guidance, config.ema)
            continue
        for nfe in config.nfe:
            yield student_sampler(
                inputs[role],
                nfe,
                device,
                config.precision,
                config.solver,
                config.grid,
                config.student_guidance,
                config.guidance_interval,
                config.ema,
                config.diffusion,
            )
        if config.reference:
            how = (config.student_guidance, config.guidance_interval, config.ema)
            yield reference_sampler(inputs[role], device, config.precision, *how)


def _solver(config: EvaluateConfig) -> dict[str, str]:
    """How students are sampled, besides what their rows say."""
    told: dict[str, str] = {"grid": config.grid}
    if config.ema is not None:
        told["ema"] = config.ema
    if config.solver in STOCHASTIC:
        told["diffusion"] = config.diffusion
    return told


def _of_published(config: EvaluateConfig, count: int) -> str:
    told = f"distances to {config.statistics}, of {count:,} images a row; published FIDs are of 50,000"
    if published_key(config) == "fid_published":
        return told
    return f"{told}, and of the weights {WEIGHTS}: these are others, so the distance is not called FID"


def _students(inputs: Iterable[str]) -> list[str]:
    return [role for role in inputs if role.partition(":")[0] == "student"]


def _line(row: dict[str, Any]) -> str:
    if "value" in row:
        return f"curvature of the student on {row['coupling']} pairs: {row['value']:.4g}"
    key = distance_key(row)
    kid = f", KID {row['kid']:.5f}" if "kid" in row else ""
    return f"{row['name']}: {DISTANCE[key]} {row[key]:.4g}{kid} on {row['samples']} images"
