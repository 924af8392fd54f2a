"""float32 is float32, and TF32 is where it was asked for alone: by the switches of torch, which a CPU has too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nfm.trainers.models.head import exact
from nfm.trainers.training.products import forbid_tf32, in_tf32, products


def allowed() -> tuple[bool, bool]:
    """What torch says of matrix products and of convolutions, in both of its ways to ask."""
    matrices = torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.allow_tf32 == matrices
    assert torch.get_float32_matmul_precision() == ("high" if matrices else "highest")
    convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.backends.cudnn.allow_tf32 == convolutions == (torch.backends.cudnn.rnn.fp32_precision == "tf32")
    return matrices, convolutions


def test_tf32_is_on_where_it_was_asked_for_and_off_afterwards() -> None:
    forbid_tf32()
    assert allowed() == (False, False)
    with products(tf32=True):
        assert allowed() == (True, True)
        with products(tf32=False):
            assert allowed() == (False, False)
        assert allowed() == (True, True)
        forbid_tf32()
        assert in_tf32()
    assert allowed() == (False, False)
    with pytest.raises(KeyError), products(tf32=True):
        raise KeyError
    assert allowed() == (False, False)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_last_layer_of_a_network_is_exact_and_may_be_compiled(compiled: bool) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return exact(self.head, self.inner(x).relu())

    network = Network()
    if compiled:
        network.compile()
    x = torch.randn(4, 3)
    with products(tf32=True):
        made = network(x)
        assert in_tf32()
    wanted = network.head.double()(network.inner(x).relu().double()).float()  # which no switch of torch rounds
    network.head.float()
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(made, network(x))
    made.sum().backward()
    assert network.inner.weight.grad is not None
