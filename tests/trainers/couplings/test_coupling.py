"""Couplings: what each pairs with an image, and at what scale."""

import itertools
import math

import numpy as np
import pytest
import torch

from nfm.trainers.couplings.coupling import NFM, Custom, Generated, Independent
from nfm.trainers.couplings.minibatch_ot import MinibatchOT, assignment, groups
from nfm.trainers.models.tarflow import TarFlow, nll_per_dim

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
Y = torch.tensor([0, 1, 2, 0, 1, 2])
EPS = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def teacher() -> TarFlow:
    torch.manual_seed(0)
    model = TarFlow((1, 8, 8), 3, 2, channels=32, blocks=2, layers=1, head_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_independent_noise_is_eps_and_has_no_likelihood() -> None:
    assert torch.equal(Independent()(X, Y, EPS).noise, EPS)
    assert Independent()(X, Y, EPS)[1:] == (None, None, None, None)


def test_nfm_noise_is_the_teachers_latent_of_the_noised_image_over_sigma_f() -> None:
    model = teacher()
    noise, nll, *others = NFM(model, eta=0.1, sigma_f=1.25)(X, Y, EPS)
    assert nll is not None
    assert others == [None, None, None]
    z, logdet = model.encode(X + 0.1 * EPS, Y)
    torch.testing.assert_close(noise, z / 1.25)
    torch.testing.assert_close(nll, nll_per_dim(z, logdet))
    assert not noise.requires_grad


def test_the_measured_sigma_f_gives_noise_of_unit_power() -> None:
    model = teacher()
    sigma_f = model.encode(X + 0.1 * EPS, Y)[0].square().mean().sqrt().item()
    noise = NFM(model, 0.1, sigma_f)(X, Y, EPS).noise
    assert noise.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_a_flipped_image_has_its_own_noise() -> None:
    coupling = NFM(teacher(), 0.0, 1.0)
    noise, flipped = coupling(X, Y, EPS).noise, coupling(X.flip(-1), Y, EPS).noise
    assert (flipped - noise.flip(-1)).abs().max() > 0.01


@pytest.mark.parametrize("double", [False, True])
def test_noise_and_nll_leave_as_float32(double: bool) -> None:
    coupling = NFM(teacher().double(), 0.1, 1.0) if double else NFM(teacher(), 0.1, 1.0, autocast=torch.bfloat16)
    noise, nll = coupling(X, Y, EPS)[:2]
    assert nll is not None
    assert noise.dtype == nll.dtype == torch.float32


@pytest.mark.parametrize("sigma_f", [0.0, math.nan, -1.0])
def test_a_sigma_f_that_is_not_positive_and_finite_is_refused(sigma_f: float) -> None:
    with pytest.raises(ValueError, match="sigma_f"):
        NFM(teacher(), 0.1, sigma_f)


def test_an_assignment_is_the_cheapest_of_all_permutations() -> None:
    images, noises = X, EPS + 2 * X[torch.tensor([3, 5, 0, 1, 4, 2])]
    costs = (images[:, None] - noises[None]).flatten(2).square().sum(2)
    best = min(itertools.permutations(range(6)), key=lambda order: costs[range(6), order].sum())
    assert assignment(images, noises).tolist() == list(best)


def _duplicated() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [60, 1, 28, 28] of which five stand for 40, among them black ones (zero, and minus zero), and noises."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 28, 28, generator=generator) * 2 - 1
    images[:40] = images[:5].repeat(8, 1, 1, 1)
    images[0:40:5] = 0.0
    images[20:40:5] = -0.0
    return images, torch.randn(60, 1, 28, 28, generator=generator)


def test_equal_images_share_out_their_noises_in_ascending_order() -> None:
    images, noises = _duplicated()
    chosen = assignment(images, noises)
    assert sorted(chosen) == list(range(60))
    for first in range(5):
        assert (np.diff(chosen[first:40:5]) > 0).all()


def test_an_assignment_of_equal_images_is_the_same_with_one_thread_and_with_two() -> None:
    images, noises = _duplicated()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(assignment(images, noises).tolist())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_noises_are_dealt_out_within_a_class_alone() -> None:
    pairs = MinibatchOT(512)(X, Y, EPS)
    assert pairs.group is not None
    assert pairs.group.tolist() == [0, 1, 2, 0, 1, 2]
    for label in range(3):
        assert {tuple(z.flatten().tolist()) for z in pairs.noise[label == Y]} == {
            tuple(z.flatten().tolist()) for z in EPS[label == Y]
        }


def test_a_group_of_one_is_independent() -> None:
    pairs = MinibatchOT(1)(X, Y, EPS)
    assert torch.equal(pairs.noise, EPS)
    with pytest.raises(ValueError, match="group_size = 0"):
        MinibatchOT(0)


@pytest.mark.parametrize(("count", "size", "sizes"), [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (3, 4, [3]), (5, 4, [3, 2])])
def test_the_groups_of_a_class_are_alike_and_no_larger_than_asked(count: int, size: int, sizes: list[int]) -> None:
    found = groups(np.full(count, 7), size)
    assert [len(members) for members in found] == sizes
    assert np.concatenate(found).tolist() == list(range(count))


def test_a_reflowed_pair_is_the_noise_and_what_is_made_of_it() -> None:
    pairs = Generated(lambda noise, labels: (noise * labels[:, None, None, None]).double())(X, Y, EPS)
    assert pairs.image is not None
    assert torch.equal(pairs.noise, EPS)
    torch.testing.assert_close(pairs.image, EPS * Y[:, None, None, None])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_the_noise_of_a_function_may_be_of_any_float_of_these(dtype: str) -> None:
    values = np.arange(8, dtype=dtype).reshape(2, 1, 2, 2) / np.array(4, dtype)
    coupling = Custom(lambda images, labels, rng: values, "f:", lambda draw, shard: np.random.default_rng(0))
    images = torch.zeros(2, 1, 2, 2)
    noise = coupling(images, torch.zeros(2, dtype=torch.int64), images).noise
    assert noise.dtype == torch.float32
    assert (noise.numpy() == values).all()


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "longdouble"])
def test_the_noise_of_a_function_that_is_of_another_dtype_is_refused(dtype: str) -> None:
    values = np.zeros((2, 1, 2, 2), dtype)
    coupling = Custom(lambda images, labels, rng: values, "f:", lambda draw, shard: np.random.default_rng(0))
    with pytest.raises(ValueError, match="return float32, float16 or float64"):
        coupling(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, 2, 2))
