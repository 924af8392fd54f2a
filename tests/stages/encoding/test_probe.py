"""The probe proposes a batch size within memory and time, and reports the true loss of precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from nfm.stages.base import StageError
from nfm.stages.encoding import probe, reference
from nfm.trainers.couplings.coupling import NFM
from nfm.trainers.models.tarflow import TarFlow

SHAPE = (1, 8, 8)


def flow(dtype: torch.dtype = torch.float32) -> TarFlow:
    torch.manual_seed(0)
    model = TarFlow(SHAPE, 3, 2, channels=32, blocks=2, layers=1, head_size=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.03 if ".head." in name else 0.1) * torch.randn_like(parameter)
    return model.to(dtype).eval()


Worker = Callable[..., tuple[list[int], Callable[[int], None]]]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Something that takes `fixed` seconds a batch and `each` an image, and has memory for `fits` of them.

    By a clock of its own, since a busy machine's sleeps are longer than the differences that a probe looks for.
    """
    now = [0.0]
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def make(fixed: float, each: float, fits: int = 10**9) -> tuple[list[int], Callable[[int], None]]:
        asked: list[int] = []

        def encode(size: int) -> None:
            asked.append(size)
            if size > fits:
                raise MemoryError
            now[0] += fixed + each * size

        return asked, encode

    return make


def test_a_size_that_does_not_fit_into_memory_is_not_proposed(worker: Worker) -> None:
    asked, encode = worker(fixed=0.02, each=0.0001, fits=10)
    proposal = probe.propose(encode, (4, 8, 16, 32), 0.1)
    assert proposal.batch_size == 8
    assert max(asked) == 16, "it goes on after memory ran out"
    assert set(proposal.rates) == {"4", "8"}
    _, encode = worker(fixed=0, each=0.01, fits=0)
    with pytest.raises(StageError, match="does not fit into memory: this device is too small"):
        probe.propose(encode, (4, 8), 0.1)


def test_slow_batches_end_the_probe(worker: Worker) -> None:
    asked, encode = worker(fixed=0, each=0.3)
    probe.propose(encode, (1, 2, 4, 8, 16), 0.1)
    assert max(asked) == 4, "it went on after a slow size"


def test_the_smallest_of_equally_fast_sizes_is_proposed(worker: Worker) -> None:
    _, encode = worker(fixed=0.0001, each=0.01)
    assert probe.propose(encode, (4, 8, 16), 0.3).batch_size == 4


def test_a_teacher_is_timed_on_the_given_threads_which_it_gives_back() -> None:
    before = torch.get_num_threads()
    proposal = probe.for_teacher(flow(), SHAPE, 3, 0.1, "cpu", "float32", before + 1, seconds=0.05, sizes=(1, 4))
    assert torch.get_num_threads() == before
    assert proposal.batch_size in (1, 4)
    assert proposal.rate > 0
    assert json.loads(json.dumps(proposal.rates)) == proposal.rates


def test_the_loss_of_precision_is_nothing_in_float64_and_grows_as_bits_go() -> None:
    inputs, errors = probe.inputs_like(SHAPE, 3, 4), {}
    for name, dtype, autocast in (
        ("float64", torch.float64, None),
        ("float32", torch.float32, None),
        ("bfloat16", torch.float32, torch.bfloat16),
    ):
        model = flow(dtype)
        images, labels, eps = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)
        noise = NFM(model, 0.1, 0.9, autocast=autocast)(images, labels, eps).noise
        errors[name] = reference.noise_error(flow(), 0.1, 0.9, *inputs, noise)
    assert errors["float64"] < 1e-7  # z is handed over in float32
    assert errors["float64"] < errors["float32"] < 1e-5
    assert 1e-4 < errors["bfloat16"] < 0.1
