"""The semidiscrete potential: equal to POT's, an unbiased chi^2, exact resume, and choices that do not depend on the
batch.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from nfm.trainers.couplings import semidiscrete
from nfm.trainers.couplings.semidiscrete import Ascent, Fitted, SemidiscreteOT, State, _Noise, chi_squared, fit
from nfm.trainers.couplings.semidiscrete_targets import Targets

ASCENT = Ascent(samples=200_000, batch_size=256, gamma=0.3, target=1e-9, check_every=100_000)


def points(count: int, dimension: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn(count, dimension, generator=generator) + shift


def normals(count: int, dimension: int, seed: int = 1) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def fitted(targets: Targets, ascent: Ascent = ASCENT, label: int = 0) -> Fitted:
    found = fit(targets, ascent, label)
    assert found is not None
    return found


def test_the_potential_is_that_of_pots_solver_up_to_a_constant() -> None:
    from ot import semidiscrete as pot

    images = points(12, 2, shift=1.5)
    ours = fitted(Targets.of(images)).potential

    def half_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return ((x[:, None] - y[None]) ** 2).sum(2) / 2

    rng = np.random.default_rng(0)
    theirs = pot.solve_semidiscrete(
        images.double().numpy(), lambda n: rng.standard_normal((n, 2)), metric=half_squares, max_iter=6000,
        batch_size=64, lr0=8.0, decreasing_reg=False,
    )  # fmt: skip
    theirs = theirs - theirs.mean()
    np.testing.assert_allclose(ours.numpy(), theirs, atol=0.03)
    assert np.abs(theirs).max() > 0.5  # it is no comparison of zeros

    z = normals(20_000, 2)
    weights = pot.semidiscrete_atom_weights(images.double().numpy(), z.double().numpy(), theirs, metric=half_squares)
    targets = Targets.of(images)
    same = targets.decide(z, targets.offsets(ours)).numpy() == weights.argmax(1)
    assert same.mean() > 0.98

    def dual(g: np.ndarray) -> float:
        transform = pot.semidiscrete_c_transform(images.double().numpy(), z.double().numpy(), g, metric=half_squares)
        return float(transform.mean() + g.mean())

    assert dual(ours.numpy()) == pytest.approx(dual(theirs), abs=1e-3)
    assert dual(ours.numpy()) > dual(np.zeros(12)) + 0.05


def test_every_image_gets_its_share_of_fresh_noise() -> None:
    targets = Targets.of(points(40, 8))
    found = fitted(targets, replace(ASCENT, target=2e-3))
    counts = targets.counts(normals(200_000, 8), targets.offsets(found.potential))
    fresh = chi_squared(counts)
    before = chi_squared(targets.counts(normals(200_000, 8), targets.offsets(torch.zeros(40, dtype=torch.float64))))
    assert found.stopped == "target"
    assert found.samples < ASCENT.samples
    assert found.chi2.value <= 2e-3
    assert fresh.value < 4e-3
    assert before.value > 0.1


def test_a_budget_that_is_too_small_is_recorded_as_the_reason() -> None:
    found = fitted(Targets.of(points(40, 8)), replace(ASCENT, samples=1000, target=1e-4))
    assert (found.stopped, found.samples) == ("budget", 1024)
    assert found.chi2.value > 1e-4


def test_chi_squared_has_no_bias_where_the_plain_formula_has() -> None:
    images, samples, trials = 1000, 4000, 300
    rng = np.random.default_rng(0)
    shares = np.full(images, 1 / images)
    found = [chi_squared(torch.from_numpy(rng.multinomial(samples, shares))) for _ in range(trials)]
    values, errors = np.array([f.value for f in found]), np.array([f.error for f in found])
    plain = (images - 1) / samples
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(trials) < plain / 50
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)  # the stated error is the spread
    assert found[0].samples == samples


def test_chi_squared_of_known_shares_is_found_with_its_error() -> None:
    rng = np.random.default_rng(0)
    shares = np.linspace(0.5, 1.5, 200) / 200
    truth = ((shares - 1 / 200) ** 2 * 200).sum()
    found = [chi_squared(torch.from_numpy(rng.multinomial(3000, shares))) for _ in range(400)]
    values, errors = np.array([f.value for f in found]), np.array([f.error for f in found])
    assert abs(values.mean() - truth) < 4 * values.std() / 20
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)


def test_chi_squared_needs_samples() -> None:
    with pytest.raises(ValueError, match="2 samples say nothing"):
        chi_squared(torch.tensor([1, 1]))


@pytest.mark.parametrize("patience", [0, 3, 40, 200])
def test_a_fit_that_was_stopped_goes_on_bit_for_bit(patience: int) -> None:
    targets = Targets.of(points(30, 5))
    ascent = replace(ASCENT, samples=40_000, check_every=20_000)
    whole = fitted(targets, ascent)
    saved: list[State] = []
    looks = itertools.count()
    found = fit(targets, ascent, 0, save=saved.append, stop=lambda: next(looks) >= patience)
    while found is None:
        state = saved[-1]
        again = State.of(state.figures(), state.potential.clone(), state.average.clone())
        found = fit(targets, ascent, 0, again, save=saved.append, stop=lambda: next(looks) % 300 == 299)
    assert saved
    assert torch.equal(found.potential, whole.potential)
    assert replace(found, potential=whole.potential) == whole


def test_a_fit_is_a_function_of_seed_and_class() -> None:
    targets = Targets.of(points(30, 5))
    ascent = replace(ASCENT, samples=20_000)
    one = fitted(targets, ascent)
    assert torch.equal(one.potential, fitted(targets, ascent).potential)
    assert not torch.equal(one.potential, fitted(targets, ascent, label=1).potential)
    assert not torch.equal(one.potential, fitted(targets, replace(ascent, seed=1)).potential)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device is not there")
def test_a_fit_goes_on_from_its_state_on_a_cuda_device() -> None:
    rows, images = torch.arange(40), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    targets = Targets(rows, lambda start, stop: images[start:stop], "cuda")
    ascent = Ascent(20_000, 256, 0.3, 1e-6, 5_000)
    whole, saved, looks = fit(targets, ascent, 0), list[State](), itertools.count()
    assert fit(targets, ascent, 0, save=saved.append, stop=lambda: next(looks) >= 20) is None
    state = saved[-1]
    found = fit(targets, ascent, 0, State.of(state.figures(), state.potential.cpu(), state.average.cpu()))
    assert whole is not None
    assert found is not None
    assert torch.equal(found.potential, whole.potential)


def test_noise_is_drawn_on_the_cpu_whatever_the_device() -> None:
    rows = torch.arange(3)
    here = Targets(rows, lambda start, stop: torch.eye(3)[start:stop])
    drawn = _Noise(1, 2, 3, "step", here, 5)(4).clone()
    there = copy.copy(here)
    there.device = torch.device("meta")  # no noise can be drawn there
    elsewhere = _Noise(1, 2, 3, "step", there, 5)
    assert elsewhere(4).device.type == "meta"
    assert torch.equal(elsewhere._buffer, drawn)


def test_images_that_do_not_fit_in_memory_give_the_same_fit() -> None:
    images, reads = points(5000, 3), []

    def read(start: int, stop: int) -> Tensor:
        reads.append(stop - start)
        return images[start:stop]

    held, streamed = Targets.of(images), Targets(torch.arange(5000), read, keep_bytes=1000)
    ascent = replace(ASCENT, samples=2000, check_every=10_000)
    before = len(reads)
    assert torch.equal(fitted(held, ascent).potential, fitted(streamed, ascent).potential)
    assert len(reads) > before + 3 * 8
    assert max(reads) < 5000
    assert streamed.bytes == 0
    assert held.bytes == 5000 * 3 * 4


def test_a_class_of_one_image_takes_every_noise() -> None:
    found = fitted(Targets.of(points(1, 4)))
    assert (found.samples, found.stopped, found.chi2.value) == (0, "target", 0.0)


@pytest.mark.parametrize("name", ["samples", "batch_size", "gamma", "target", "check_every"])
def test_an_ascent_names_what_is_not_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        replace(ASCENT, **{name: 0})


def coupling(images: Tensor, labels: Tensor, keep_bytes: int = 1 << 30) -> tuple[SemidiscreteOT, list[int]]:
    """Potentials under which many images are chosen; choices are the argmax whatever they are."""
    asked: list[int] = []

    def targets(label: int) -> Targets:
        asked.append(label)
        rows = torch.nonzero(labels == label)[:, 0]
        return Targets.of(images[rows], rows)

    generator = torch.Generator().manual_seed(5)
    potentials = {}
    for label in labels.unique().tolist():
        squares = images[labels == label].flatten(1).double().square().sum(1)
        potentials[label] = squares / 2 + 0.1 * torch.randn(len(squares), generator=generator, dtype=torch.float64)
    return SemidiscreteOT(targets, potentials, keep_bytes), asked


def chosen(coupling: SemidiscreteOT, labels: Tensor, eps: Tensor) -> Tensor:
    row = coupling(torch.zeros_like(eps), labels, eps).row
    assert row is not None
    return row


def test_a_choice_is_the_float64_argmax_of_the_record_alone_in_any_batch() -> None:
    images = points(6000, 48, shift=3.0).reshape(6000, 3, 4, 4)
    images[4000:] = images[:2000] + 1e-6 * images[2000:4000]  # near twins, which float32 products confuse
    labels = torch.arange(6000) % 2
    chooser, _ = coupling(images, labels)
    for potential in chooser._potentials.values():
        potential[2000:] = potential[:1000] + 1e-7
    eps = normals(300, 48).reshape(300, 3, 4, 4)
    mine = torch.arange(300) // 3 % 2
    whole = chosen(chooser, mine, eps)
    parts = [chosen(chooser, mine[i : i + n], eps[i : i + n]) for n in (1, 7) for i in range(0, 300, n)]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat(parts), whole.repeat(2))
    assert torch.equal(chosen(chooser, mine[order], eps[order]), whole[order])
    for label in (0, 1):
        rows = torch.nonzero(labels == label)[:, 0]
        y, z = images[rows].flatten(1).double(), eps[mine == label].flatten(1).double()
        scores = z @ y.T + chooser._potentials[label] - y.square().sum(1) / 2
        assert torch.equal(whole[mine == label], rows[scores.argmax(1)])
        second = scores.topk(2).values
        assert (second[:, 0] - second[:, 1] < 1e-3).float().mean() > 0.2  # the test does meet near ties


def test_of_equal_images_the_first_is_chosen() -> None:
    chooser = SemidiscreteOT(lambda label: Targets.of(torch.ones(5000, 4)), {0: torch.zeros(5000, dtype=torch.float64)})
    assert chosen(chooser, torch.zeros(40, dtype=torch.int64), normals(40, 4)).tolist() == [0] * 40


def test_noise_stays_untouched_and_images_are_of_the_records_class() -> None:
    images, labels = points(90, 6), torch.arange(90) % 3
    chooser, asked = coupling(images, labels)
    eps, mine = normals(50, 6), torch.arange(50) % 3
    before = eps.clone()
    pairs = chooser(images[:50], mine, eps)
    assert torch.equal(pairs.noise, before)
    assert torch.equal(eps, before)
    assert pairs.row is not None
    assert torch.equal(labels[pairs.row], mine)
    assert pairs.image is None
    assert pairs.nll is None
    chooser(images[:50], mine, eps)
    assert asked == [0, 1, 2]  # once, when a class is first met


def test_memory_of_images_is_bounded_over_the_classes() -> None:
    images, labels = points(90, 6), torch.arange(90) % 3
    bounded, _ = coupling(images, labels, keep_bytes=2 * 30 * 6 * 4)
    eps, mine = normals(50, 6), torch.arange(50) % 3
    free, _ = coupling(images, labels)
    assert torch.equal(chosen(bounded, mine, eps), chosen(free, mine, eps))
    assert sum(targets.bytes > 0 for targets in bounded._classes.values()) == 2


def test_a_label_without_a_potential_and_one_of_other_data_are_refused() -> None:
    images = points(30, 6)
    chooser = SemidiscreteOT(lambda label: Targets.of(images), {0: torch.zeros(29, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"label 7 has no potential; there are those of \[0\]"):
        chosen(chooser, torch.tensor([7]), normals(1, 6))
    with pytest.raises(ValueError, match="label 0: 30 images, but a potential of 29"):
        chosen(chooser, torch.tensor([0]), normals(1, 6))
    with pytest.raises(ValueError, match="a class without images"):
        Targets.of(images[:0])


def test_no_batch_times_images_array_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    product = torch.mm

    def watched(*arguments: Tensor) -> Tensor:
        out = product(*arguments)
        largest.append(out.numel())
        return out

    monkeypatch.setattr(semidiscrete.torch, "mm", watched)
    targets = Targets.of(points(6000, 4))
    targets.best(normals(3000, 4), targets.offsets(torch.zeros(6000, dtype=torch.float64)))
    assert max(largest) <= 256 * 2048
    assert len(largest) == 12 * 3
