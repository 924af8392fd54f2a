"""How fast a teacher encodes on this machine: its ways side by side, beside the products that it is made of."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.encode.parts import Products, profile
from benchmarks.store.rows import in_turns
from nfm.stages.encoding import probe, reference
from nfm.stages.trained import costs
from nfm.stages.trained.devices.machine import free_memory
from nfm.stages.trained.devices.precision import Precision, autocast_dtype

if TYPE_CHECKING:
    import torch

    from nfm.trainers.couplings.coupling import NFM
    from nfm.trainers.models.tarflow import TarFlow

PLAIN = "plain float32 eager loop"
ERROR_IMAGES, ETA, SEED = 4, 0.1, 0


@dataclass(frozen=True)
class Case:
    """A teacher's sizes and where it runs; `batch` is the plain loop's, `probed` in seconds what a probe may take."""

    name: str
    image_shape: tuple[int, int, int]
    classes: int
    patch: int
    channels: int
    blocks: int
    layers: int
    head_size: int
    batch: int
    device: str
    threads: int
    probed: float = probe.SECONDS

    def architecture(self) -> dict[str, Any]:
        """What builds the teacher."""
        skipped = {"name", "batch", "device", "threads", "probed"}
        return {key: value for key, value in asdict(self).items() if key not in skipped}

    def model(self) -> TarFlow:
        """A teacher of random weights, as tame as a trained one, on the device."""
        import torch

        from nfm.trainers.models.tarflow import TarFlow

        torch.manual_seed(SEED)
        model = TarFlow(**self.architecture())
        with torch.no_grad():  # a new flow's heads are zero, and would hide what precision costs
            for name, parameter in model.named_parameters():
                if name.endswith("head.weight"):
                    parameter.normal_(std=0.1 / math.sqrt(self.channels))
        return model.eval().to(self.device)

    @property
    def flops(self) -> float:
        """To encode one image."""
        return costs.teacher_flops(list(self.image_shape), self)


@dataclass
class Way:
    """One way to encode: `encode(size)` encodes a batch and waits for its end."""

    name: str
    precision: Precision
    batch: int
    encode: Callable[[int], object]
    coupling: NFM
    compile_seconds: float | None = None


def measure(case: Case, passes: int, compiled: bool) -> dict[str, Any]:
    """Everything about one case as JSON's types: rows, rates of products, the profile of the fastest of our rows."""
    model = case.model()
    batches: dict[Precision, probe.Proposal] = {
        precision: probe.for_teacher(
            model, case.image_shape, case.classes, ETA, case.device, precision, case.threads, seconds=case.probed
        )
        for precision in ("float32", "bfloat16")
    }
    ways, failed = _ways(case, model, {precision: found.batch_size for precision, found in batches.items()}, compiled)
    products = {precision: Products(case, precision, found.batch_size) for precision, found in batches.items()}
    works: dict[str, Callable[[], float]] = {way.name: _timed(way) for way in ways}
    works |= {precision: product.rate for precision, product in products.items()}
    found = in_turns(works, passes)
    plain = median(found[PLAIN])
    rows = [_row(case, way, found[way.name], found[way.precision], plain) for way in ways]
    fastest = max((row for row in rows if row["name"] != PLAIN), key=lambda row: row["images_per_second"])
    chosen = next(way for way in ways if way.name == fastest["name"])
    eager = next(way for way in ways if way.name == f"ours {chosen.precision}")
    body = {
        "sizes": {key: value for key, value in asdict(case).items() if key not in ("name", "probed")},
        "gflop_per_image": _short(case.flops / 1e9),
        "probe": {precision: asdict(proposal) for precision, proposal in batches.items()},
        "matrix_gflops": {
            precision: {"best": _gflops(max(found[precision])), "median": _gflops(median(found[precision]))}
            for precision in products
        },
        "rows": rows + failed,
        "fastest": fastest["name"],
        "profile": {"of": eager.name, "share_of_time": profile(eager)},
    }  # fmt: skip
    free_memory(case.device)
    return body


def _ways(
    case: Case, model: TarFlow, batches: Mapping[Precision, int], compiled: bool
) -> tuple[list[Way], list[dict[str, Any]]]:
    """The ways that work here, warm, and rows that say why others do not."""
    from nfm.trainers.couplings.coupling import NFM

    def coupling(of: TarFlow, precision: Precision) -> NFM:
        return NFM(of, ETA, 1.0, case.device, autocast_dtype(precision))

    def encoding(of: NFM) -> Callable[[int], object]:
        return probe.encoding(of, case.image_shape, case.classes)

    plain = coupling(model, "float32")
    ways = [Way(PLAIN, "float32", case.batch, _plain(case, model), plain)]
    for precision, batch in batches.items():
        ours = coupling(model, precision)
        ways.append(Way(f"ours {precision}", precision, batch, encoding(ours), ours))
    for way in ways:
        way.encode(way.batch)
    failed = []
    for precision, batch in batches.items() if compiled else ():
        name, twin = f"ours {precision}, compiled", copy.deepcopy(model)
        twin.compile(dynamic=False)
        ours = coupling(twin, precision)
        way = Way(name, precision, batch, encoding(ours), ours)
        try:
            first, second = (_seconds(way) for _ in range(2))
        except Exception as error:  # no compiler here, or one that cannot: told, and the others keep their figures
            reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
            failed.append({"name": name, "not_measured": f"{type(error).__name__}: {reason}"})
            continue
        way.compile_seconds = round(first - second, 1)
        ways.append(way)
    return ways, failed


def _plain(case: Case, model: TarFlow) -> Callable[[int], object]:
    """What anyone would write first: the model called on batch after batch, no parameter asking for a gradient."""
    inputs: dict[int, tuple[torch.Tensor, ...]] = {}
    model.requires_grad_(False)

    def encode(size: int) -> object:
        if size not in inputs:
            inputs[size] = probe.inputs_like(case.image_shape, case.classes, size)
        images, labels, eps = inputs[size]
        z, logdet = model.encode((images + ETA * eps).to(case.device), labels.to(case.device))
        return z.cpu(), logdet.cpu()

    return encode


def _row(case: Case, way: Way, rates: list[float], products: list[float], plain: float) -> dict[str, Any]:
    rate = median(rates)
    inputs = probe.inputs_like(case.image_shape, case.classes, way.batch)
    noise = way.coupling(*inputs).noise
    few = [tensor[:ERROR_IMAGES] for tensor in (*inputs, noise)]
    return {
        "name": way.name,
        "batch": way.batch,
        "images_per_second": _short(rate),
        "lowest": _short(min(rates)),
        "highest": _short(max(rates)),
        "gflops": _gflops(rate * case.flops),
        "of_best_matrix_rate": round(rate * case.flops / max(products), 3),
        "of_median_matrix_rate": round(rate * case.flops / median(products), 3),
        "over_plain": round(rate / plain, 2),
        "noise_rms_error": _short(reference.noise_error(way.coupling.model, ETA, 1.0, *few)),
        **({} if way.compile_seconds is None else {"compile_seconds": way.compile_seconds}),
    }


def _timed(way: Way) -> Callable[[], float]:
    """A work for `in_turns`: images a second of a batch, or of several where one is short."""

    def rate() -> float:
        started, done = time.perf_counter(), 0
        while not done or time.perf_counter() - started < 0.25:
            way.encode(way.batch)
            done += way.batch
        return done / (time.perf_counter() - started)

    return rate


def _seconds(way: Way) -> float:
    started = time.perf_counter()
    way.encode(way.batch)
    return time.perf_counter() - started


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _gflops(flops: float) -> float:
    return round(flops / 1e9, 1)
