"""Measures the pairs of a store: the distance of noise and image, how near the noise is to N(0, I), which rows are
paired.

A student samples from N(0, I). It cannot be better than the match between its store's noise and N(0, I). The report is
made when a generation is sealed, and by `nfm pairs report` for any store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from nfm.stages.base import Inputs, Reporter, StageError, Stopped
from nfm.stages.couplings.facts import facts_of
from nfm.stages.couplings.rows import slot_is_row
from nfm.stages.pairs.coupling_advice import advice, lines
from nfm.stages.pairs.coupling_sample import Sample, draw_sample, row_counts
from nfm.stages.pairs.recipe import content
from nfm.storage import ImageDataset, PairStore
from nfm.storage.files import atomic

if TYPE_CHECKING:
    import torch

__all__ = ["advice", "contents_of", "lines", "measure", "measure_at"]
Stop = Callable[[], bool]
SEED = 0
AUC_PAIRS = 40_000  # that the network of the two-sample AUC sees, at most
CLASSES = 100  # classes reported separately, among those with at least so many records in the sample:
CLASS_RECORDS = 64
HELDOUT_ROWS = 2048
HELDOUT_FLOPS = 1e13  # on a CPU: half a minute to a minute on two cores
FEWEST_HELDOUT = 32  # rows; with fewer, their mean says little
BATCH_FLOPS, BATCH_BYTES = {"cpu": 2e11, "cuda": 1e13}, 32 << 20  # for one batch of held-out images


def contents_of(where: str | Path) -> dict[str, str]:
    """The content digests of what a store was made from, by stage: data, and teacher if there was one."""
    spec = PairStore.open(where).spec
    return {"data": spec.source} | ({"teacher": spec.teacher} if spec.teacher else {})


def measure_at(where: str | Path, inputs: Inputs) -> dict[str, Any]:
    """`measure` of a store, given by folder, URL or manifest."""
    return measure(PairStore.open(where), inputs)


def measure(store: PairStore, inputs: Inputs, report: Reporter | None = None, device: str = "auto") -> dict[str, Any]:
    """The coupling report of a generation, in JSON's types: finite numbers, or None if nothing can be measured.

    It uses a limited, seeded sample. `transport_cost` is mean |z - x|^2 / d, with the mean over all ways to pair the
    same noises and images. There are moments of z and Kolmogorov-Smirnov on projections, for all and by class, with
    those of as many new normal vectors; and the two-sample `auc`. `rows` covers all pairs if the index can be read.
    `nll_heldout` needs the teacher and the data in the inputs, and time for 32 rows. Raises StageError for noise that
    is not finite, and Stopped soon after `report` says that it is stopping.
    """
    import torch

    from nfm.stages.trained.devices.machine import pick_device
    from nfm.trainers.metrics.two_sample import two_sample

    started, device = time.monotonic(), pick_device(device)
    stop = (lambda: False) if report is None else (lambda: report.stopping)
    sample = draw_sample(store, SEED)
    _unless(stop)
    z = torch.from_numpy(sample.noise)
    if not bool(torch.isfinite(z).all()):
        raise StageError(f"{store.root}: noise that is not finite; `nfm pairs verify {store.root} --deep` says where")
    fresh = torch.randn(z.shape, generator=torch.Generator().manual_seed(SEED))
    body: dict[str, Any] = {
        "pairs": len(z),
        "shards": sample.shards,
        "image": _scale(store, sample.image),
        **_transport(sample),
        "noise": _gaussianity(z),
        "noise_expected": _gaussianity(fresh),
        "classes": _by_class(z, fresh, sample.label, stop),
    }
    _unless(stop)
    if len(z) >= 20:
        labels, classes = torch.from_numpy(sample.label), store.spec.classes or 0
        found = two_sample(z.reshape(-1, *_image_shape(store)), labels, classes, SEED, device, stop, AUC_PAIRS)
        if found is None:
            raise Stopped
        body |= {"auc": found.auc, "auc_error": found.error, "auc_trained": found.trained, "auc_heldout": found.heldout}
    body |= {"rows": _rows(store), **_nll(store, sample, inputs, device, stop)}
    facts = facts_of(store.spec.coupling)
    body |= {"exact": list(facts.exact), "approximate": list(facts.approximate)}
    body |= {"coupling": store.spec.coupling, "excluded": sum(hole["records"] for hole in store.excluded)}
    body = _jsonable(body)
    if report is not None:
        seconds = time.monotonic() - started
        report.say(f"coupling report of {len(z):,} pairs in {seconds:.0f} s: two-sample AUC {_shown(body.get('auc'))}")
        for text in advice(body):
            report.say(text)
    return body


def _unless(stop: Stop) -> None:
    """Raises Stopped if the user asked to stop."""
    if stop():
        raise Stopped


def _scale(store: PairStore, x: np.ndarray) -> dict[str, Any]:
    """The images as students get them: dtype in the store, lowest and highest value, root mean square."""
    power = sum(float(np.square(part, dtype=np.float64).sum()) for part in np.array_split(x, -(-len(x) // 1024)))
    size = math.sqrt(power / x.size)
    return {"dtype": store.spec.field("image").dtype, "low": float(x.min()), "high": float(x.max()), "size": size}


def _transport(sample: Sample) -> dict[str, float]:
    """The cost per dimension of the pairs, and the mean cost over all permutations of the sample's noises."""
    x, z, size = sample.image, sample.noise, sample.image.shape[1]
    parts = [slice(start, start + 1024) for start in range(0, len(x), 1024)]
    paired = sum(float(np.square(z[part] - x[part], dtype=np.float64).sum()) for part in parts) / x.size
    powers = sum(float(np.square(a[part], dtype=np.float64).sum()) for part in parts for a in (x, z)) / x.size
    between = float(x.mean(0, dtype=np.float64) @ z.mean(0, dtype=np.float64)) / size
    return {"transport_cost": paired, "transport_cost_independent": powers - 2 * between}


def _gaussianity(z: torch.Tensor) -> dict[str, float]:
    """Moments of the dimensions, and Kolmogorov-Smirnov of projections, of z [n, D]."""
    from nfm.trainers.metrics.gaussianity import deviation, projected

    ks = projected(z, SEED)
    return {**deviation(z)._asdict(), "ks_statistic": ks.statistic, "ks_p": ks.p}


def _by_class(z: torch.Tensor, fresh: torch.Tensor, labels: np.ndarray, stop: Stop) -> list[dict[str, Any]]:
    """The same for each of the largest classes; `expected` has the figures of as many new normal vectors."""
    found, counts = np.unique(labels, return_counts=True)
    large = sorted(found[counts >= CLASS_RECORDS].tolist(), key=lambda label: -counts[found == label][0])[:CLASSES]
    rows = []
    for label in sorted(label for label in large if label >= 0):
        _unless(stop)
        own = np.flatnonzero(labels == label)
        noise, expected = _gaussianity(z[own]), _gaussianity(fresh[own])
        rows.append({"label": label, "records": len(own), **noise, "expected": expected})
    return rows


def _rows(store: PairStore) -> dict[str, Any] | None:
    """How often the rows of the source are paired; None if the images are not rows of the source.

    `chi2` is sum_j (p_j - 1/N)^2 N over the N rows. The same number of uniformly drawn pairs gives `chi2_expected`. It
    is 0 if slots are rows; then only excluded pairs contribute to chi^2.
    """
    if facts_of(store.spec.coupling).image == "generated":
        return None
    counts, whole = row_counts(store, SEED)
    total, rows = int(counts.sum()), len(counts)
    shares = counts / max(total, 1)
    return {
        "counted": total,
        "all_counted": whole,
        "fewest": int(counts.min()),
        "most": int(counts.max()),
        "never": float((counts == 0).mean()),
        "chi2": float(np.square(shares - 1 / rows).sum() * rows),
        "chi2_expected": 0.0 if slot_is_row(store.spec) else (rows - 1) / max(total, 1),
    }


def _nll(store: PairStore, sample: Sample, inputs: Inputs, device: str, stop: Stop) -> dict[str, float | None]:
    """The teacher's nats per dimension, without the constant, on rows of its training set and on held-out rows."""
    known = sample.nll[np.isfinite(sample.nll)]
    mean, error = _mean_and_error(known)
    body: dict[str, float | None] = {"nll_train": mean, "nll_train_error": error}
    heldout = np.zeros(0)
    if (
        facts_of(store.spec.coupling).made_with == "teacher"
        and {"teacher", "data"} <= set(inputs)
        and content(inputs["teacher"]) == store.spec.teacher
    ):
        heldout = _heldout_nll(store, inputs, device, stop)
    mean, error = _mean_and_error(heldout)
    return body | {"nll_heldout": mean, "nll_heldout_error": error, "nll_heldout_rows": len(heldout)}


def _heldout_nll(store: PairStore, inputs: Inputs, device: str, stop: Stop) -> np.ndarray:
    """nll of held-out rows, with noise added as for the images of the store: float64 [n]; empty if nothing was held
    out.

    Also empty if the teacher is so large that less than `FEWEST_HELDOUT` rows fit into `HELDOUT_FLOPS`.
    """
    import torch

    from nfm.stages.trained import costs, teacher
    from nfm.stages.trained.foreign import own
    from nfm.trainers.models.tarflow import nll_per_dim

    source = ImageDataset.open(inputs["data"], "heldout")
    facts = atomic.read_json(inputs["teacher"] / "teacher.json")
    if own.recorded(inputs["teacher"], "teacher"):  # code, whose arithmetic nobody knows
        return np.zeros(0)
    flops = costs.teacher_flops(source.image_shape, SimpleNamespace(**facts["architecture"]))
    count = heldout_rows(len(source), flops, device)
    if not count:
        return np.zeros(0)
    model, _ = teacher.load(inputs["teacher"], device)
    size = heldout_batch(flops, math.prod(source.image_shape), device)
    found = []
    with torch.inference_mode():
        for part in np.split(np.arange(count, dtype=np.int64), range(size, count, size)):
            _unless(stop)
            z, logdet = teacher.encode_rows(model, source, part, facts["eta"], store.spec.seed, "heldout")
            found.append(nll_per_dim(z, logdet).double().cpu().numpy())
    return np.concatenate(found)


def heldout_rows(there: int, flops: float, device: str) -> int:
    """How many held-out rows are measured, at `flops` each; 0 if that would be too few."""
    affordable = HELDOUT_ROWS if device != "cpu" else int(HELDOUT_FLOPS / flops)
    return min(there, HELDOUT_ROWS, affordable) if affordable >= FEWEST_HELDOUT else 0


def heldout_batch(flops: float, values: int, device: str) -> int:
    """Rows of `values` numbers in one batch. The memory of activations grows about as the FLOPs do."""
    most = BATCH_FLOPS["cpu" if device == "cpu" else "cuda"]
    return max(1, min(128, int(most / flops), BATCH_BYTES // (4 * values)))


def _mean_and_error(values: np.ndarray) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _image_shape(store: PairStore) -> tuple[int, int, int]:
    channels, height, width = store.spec.image_shape
    return channels, height, width


def _jsonable(value: Any) -> Any:
    """The same with floats of six digits, and None for floats that are not finite."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _shown(auc: float | None) -> str:
    return "unknown" if auc is None else f"{auc:.3f}"
