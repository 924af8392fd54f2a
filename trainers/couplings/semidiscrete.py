"""Semidiscrete optimal transport from N(0, I) to the images of a class, by one dual potential.

The potential g maximizes E_z[min_j c(z, y_j) - g_j] + mean_j g_j with c = |z - y|^2 / 2. Then z is assigned to argmax_j
<z, y_j> + g_j - |y_j|^2 / 2 (Genevay, Cuturi, Peyre and Bach 2016, arXiv 1605.08527; as a coupling for flow matching:
Mousavi-Hosseini, Zhang, Klein and Cuturi 2025, arXiv 2509.25519). z stays exactly Gaussian. Images are chosen only
approximately equally often; chi^2 measures the difference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nfm.trainers.couplings.coupling import Pairs, Scope
from nfm.trainers.couplings.semidiscrete_targets import Targets

_STARTS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
_START_NOISES = 2048
DECAY = 2 / 3  # of the step size, gamma_t ~ t^-DECAY
FORGETTING = 1  # weight of iterate t in the average ~ t^FORGETTING, so that early iterates count little


@dataclass(frozen=True)
class ChiSquared:
    """chi^2 = sum_j (p_j - b_j)^2 / b_j of the shares p_j of the noise that each image gets; b_j = 1 / N.

    Estimated from the counts of `samples` new noises, without the bias (N - 1) / samples of the plain formula; so it
    may be below zero. `error` is its standard error.
    """

    value: float
    error: float
    samples: int


@dataclass(frozen=True)
class Ascent:
    """The settings of a fit that change its result.

    `gamma` is in the problem's own units, see `fit`; samples are noises.
    """

    samples: int
    batch_size: int
    gamma: float
    target: float
    check_every: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "gamma", "target", "check_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def steps(self) -> int:
        """The budget in whole batches, rounded up."""
        return -(-self.samples // self.batch_size)


@dataclass
class State:
    """The state of a fit: two tensors, float64 [N]. `step` counts the batches, `checked` is the step of `chi2`."""

    step: int
    potential: Tensor
    average: Tensor
    checked: int = -1
    chi2: ChiSquared | None = None

    def figures(self) -> dict[str, Any]:
        """Everything except the tensors, in JSON's types."""
        return {"step": self.step, "checked": self.checked, "chi2": asdict(self.chi2) if self.chi2 else None}

    @staticmethod
    def of(figures: dict[str, Any], potential: Tensor, average: Tensor) -> State:
        """The state with these `figures` and tensors."""
        chi2 = ChiSquared(**figures["chi2"]) if figures["chi2"] else None
        return State(figures["step"], potential, average, figures["checked"], chi2)


@dataclass(frozen=True)
class Fitted:
    """A finished fit: the potential float64 [N] with mean zero, the number of noises used, and why it stopped."""

    potential: Tensor
    samples: int
    chi2: ChiSquared
    stopped: Literal["target", "budget"]


def fit(
    targets: Targets,
    ascent: Ascent,
    label: int,
    state: State | None = None,
    save: Callable[[State], None] | None = None,
    save_every: int | None = None,
    log: Callable[[int, ChiSquared], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Fitted | None:
    """Averaged stochastic ascent until chi^2 <= target or the budget is used; None if `stop()` became true first.

    Step t moves g_j by gamma_t (1/N - share of the batch given to j), with gamma_t = gamma r sqrt(N B) t^(-2/3), r =
    rms |y_j - mean y|. So a batch that gives j one noise too many lowers g_j by about gamma r sqrt(N / B); r is the
    spread of <z, y_j>, to which g_j is added. The average weighs iterate t by t (Shamir and Zhang 2013, arXiv
    1212.1824): a uniform average would keep early iterates for long.

    The noise of step t depends only on (seed, label, t). So a fit that continues from a saved `state` equals an
    uninterrupted one, bit by bit with the same number of threads. `save` is called with a state whenever the noises
    seen pass a multiple of `save_every`, and after a stop; `log` with the noises seen, each time that chi^2 was
    measured.
    """
    count, batch_size = len(targets), ascent.batch_size
    if count == 1:
        return Fitted(torch.zeros(1, dtype=torch.float64), 0, ChiSquared(0.0, 0.0, 0), "target")
    if state is None:
        noise = _Noise(ascent.seed, label, 0, "start", targets, _START_NOISES)
        start = targets.half_squares + starting_offsets(targets, noise(0))
        state = State(0, start, start.clone())
    state.potential, state.average = state.potential.to(targets.device), state.average.to(targets.device)
    gamma = ascent.gamma * targets.radius * math.sqrt(count * batch_size)

    def stopped() -> bool:
        if not stop():
            return False
        if save is not None:
            save(state)
        return True

    while True:
        # Measure.
        seen = state.step * batch_size
        due = state.step > 0 and seen // ascent.check_every != (seen - batch_size) // ascent.check_every
        if (due or state.step >= ascent.steps) and state.checked != state.step:
            noise = _Noise(ascent.seed, label, state.step, "chi2", targets, batch_size)
            last = state.step >= ascent.steps
            found = measure(targets, state.average, noise, ascent.target, seen, 0.1 if last else math.inf, stop)
            if found is None:
                if save is not None:
                    save(state)
                return None
            state.chi2, state.checked = found, state.step
            if log is not None:
                log(seen, found)
        if state.checked == state.step and state.chi2 is not None:
            reached = state.chi2.value <= ascent.target
            if reached or state.step >= ascent.steps:
                potential = (state.average - state.average.mean()).cpu()
                return Fitted(potential, seen, state.chi2, "target" if reached else "budget")
        if stopped():
            return None

        # Step.
        state.step += 1
        noise = _Noise(ascent.seed, label, state.step, "step", targets, batch_size)
        counts = targets.counts(noise(0), targets.offsets(state.potential))
        state.potential += (gamma * state.step**-DECAY) * (1 / count - counts.double() / batch_size)
        weight = (FORGETTING + 1) / (state.step + FORGETTING)
        state.average += weight * (state.potential - state.average)

        # Save.
        seen += batch_size
        if save is not None and save_every is not None and seen // save_every != (seen - batch_size) // save_every:
            save(state)


def starting_offsets(targets: Targets, z: Tensor) -> Tensor:
    """The initial g_j - |y_j|^2 / 2, float64 [N]: -k |y_j - mean y|, with the k that fits noises z [n, D] best.

    <z, y_j - mean y> is normal with standard deviation |y_j - mean y|. Without this penalty the images far from the
    mean would get all noises.
    """
    found = {k: chi_squared(targets.counts(z, -k * targets.radii)).value for k in _STARTS}
    return -min(found, key=lambda k: found[k]) * targets.radii


def measure(
    targets: Targets,
    potential: Tensor,
    noise: Callable[[int], Tensor],
    target: float,
    at_most: int,
    precision: float = 0.1,
    stop: Callable[[], bool] = lambda: False,
) -> ChiSquared | None:
    """chi^2 of a potential, from as many noises as its use needs; None if `stop()` became true first.

    `noise(i)` is the i-th batch. It stops at a standard error of target / 2 where chi^2 = 0, that is 2 sqrt(2 N) /
    target noises; earlier if chi^2 is three standard errors above the target and its error is at most `precision` times
    itself; and soon after `at_most`. The number of noises in the fit is enough: a potential from n of them has chi^2 of
    about (N - 1) / n, many times the error sqrt(2 N) / n.
    """
    most = min(math.ceil(2 * math.sqrt(2 * len(targets)) / target), max(at_most, 4096))
    offsets = targets.offsets(potential)
    counts = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
    found, taken, look, batch = None, 0, 4096, 0
    while found is None or taken < most:
        if stop():
            return None
        z = noise(batch)
        counts += targets.counts(z, offsets)
        taken, batch = taken + len(z), batch + 1
        if taken >= min(look, most):
            found = chi_squared(counts)
            look *= 2
            if found.value - target > 3 * found.error and found.error <= precision * found.value:
                break
    return found


def chi_squared(counts: Tensor) -> ChiSquared:
    """chi^2 against the uniform distribution from int64 counts [N] of S >= 3 samples, unbiased.

    chi^2 + 1 = N sum p_j^2, estimated by the share of pairs of samples that agree: N sum n_j (n_j - 1) / (S (S - 1)).
    The error is that of this U-statistic (Hoeffding 1948), with sum p_j^3 estimated by triples.
    """
    n = counts.double()
    size, samples = len(n), float(n.sum())
    if samples < 3:
        raise ValueError(f"{samples:.0f} samples say nothing of chi^2; give at least 3")
    pairs = float((n * (n - 1)).sum()) / (samples * (samples - 1))
    triples = float((n * (n - 1) * (n - 2)).sum()) / (samples * (samples - 1) * (samples - 2))
    first = max(triples - pairs**2, 0.0)
    variance = 2 / (samples * (samples - 1)) * (2 * (samples - 2) * first + pairs * (1 - pairs))
    return ChiSquared(size * pairs - 1, size * math.sqrt(variance), int(samples))


class SemidiscreteOT:
    """The potential of a class assigns z to an image of the class. z is eps itself, unchanged.

    The choice for a record depends only on its label and noise, see `Targets.decide`.
    """

    name = "semidiscrete-ot"
    scope: Scope = "record"

    def __init__(
        self, targets: Callable[[int], Targets], potentials: Mapping[int, Tensor], keep_bytes: int = 1 << 30
    ) -> None:
        """`targets(label)` gives the images of a class. It is called once, when the class first occurs.

        potentials: float64 [N] by label. keep_bytes: of images in memory, for all classes together. The least recently
        used classes are released first, so one call with many records reads less than many calls with few.
        """
        self._make = targets
        self._potentials = dict(potentials)
        self._keep_bytes = keep_bytes
        self._classes: dict[int, Targets] = {}  # in the order of use

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> Pairs:
        row = torch.empty(len(eps), dtype=torch.int64)
        for label in labels.unique().tolist():
            targets = self._of(label)
            place = torch.nonzero(labels.cpu() == label)[:, 0]
            z = eps[place.to(eps.device)].flatten(1).to(targets.device)
            row[place] = targets.rows[targets.decide(z, targets.offsets(self._potentials[label])).cpu()]
        return Pairs(eps, row=row.to(eps.device))

    def _of(self, label: int) -> Targets:
        """The images of a class, in memory if possible. It becomes the most recently used class."""
        if label not in self._potentials:
            raise ValueError(f"label {label} has no potential; there are those of {sorted(self._potentials)}")
        targets = self._classes.pop(label, None) or self._make(label)
        if len(targets) != len(self._potentials[label]):
            raise ValueError(
                f"label {label}: {len(targets)} images, but a potential of {len(self._potentials[label])}; "
                "fit it on this data"
            )
        targets.keep()
        self._classes[label] = targets
        for oldest in list(self._classes.values())[:-1]:
            if sum(other.bytes for other in self._classes.values()) <= self._keep_bytes:
                break
            oldest.release()
        return targets


class _Noise:
    """Batches of N(0, I) that depend only on (seed, label, step, batch). They are drawn on the CPU for every device.

    On a CPU all share the same memory: a batch is overwritten when the next is drawn.
    """

    def __init__(self, seed: int, label: int, step: int, purpose: str, targets: Targets, size: int) -> None:
        self._key = (seed, label, step)
        self._purpose = purpose
        self._device = targets.device
        self._buffer = torch.empty(size, targets.dimension)
        self._generator = torch.Generator()

    def __call__(self, batch: int) -> Tensor:
        self._generator.manual_seed(_seed(*self._key, batch, self._purpose))
        return self._buffer.normal_(generator=self._generator).to(self._device)


def _seed(seed: int, label: int, step: int, batch: int, purpose: str) -> int:
    name = f"semidiscrete,{purpose},{seed},{label},{step},{batch}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1  # torch accepts 63 bits
