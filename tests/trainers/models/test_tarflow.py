"""TarFlow against its definition: an exact inverse, an exact log-determinant, strictly causal."""

import math

import pytest
import torch
from torch import Tensor

from nfm.trainers.models.tarflow import Guidance, MetaBlock, TarFlow, bits_per_dim, denoise, nll_per_dim


def flow(
    image_shape: tuple[int, int, int] = (1, 8, 8),
    classes: int = 3,
    patch: int = 2,
    blocks: int = 3,
    dtype: torch.dtype = torch.float32,
) -> TarFlow:
    """A small flow whose every weight matters; small heads keep it as tame as a trained one."""
    torch.manual_seed(0)
    model = TarFlow(image_shape, classes, patch, channels=32, blocks=blocks, layers=2, head_size=16).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.03 if ".head." in name else 0.1) * torch.randn_like(parameter)
    return model


def images(count: int, shape: tuple[int, int, int] = (1, 8, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1


LABELS = torch.tensor([0, 1, 2, -1, 1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 8)])
def test_decode_inverts_encode(dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int]) -> None:
    model, x = flow(shape, dtype=dtype), images(5, shape, dtype)
    with torch.no_grad():
        z, logdet = model.encode(x, LABELS)
        back = model.decode(z, LABELS)
    assert z.shape == x.shape
    assert z.dtype == logdet.dtype == dtype
    assert (z - x).abs().mean() > 0.2, "the flow is too near the identity to show anything"
    assert (back - x).abs().max() < tolerance


def test_encoding_without_gradients_works_in_place_and_gives_the_same_bits() -> None:
    model, x = flow(), images(5)
    given = x.clone()
    z, logdet = model.encode(x, LABELS)
    assert z.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again, same_logdet = model.encode(x, LABELS)
        assert torch.equal(again, z)
        assert torch.equal(same_logdet, logdet)
    assert torch.equal(x, given)


def test_a_compiled_flow_encodes_alike_with_one_graph_for_all_layers_and_decodes_uncompiled() -> None:
    from torch._dynamo.utils import counters

    model, x = flow(), images(5)
    with torch.inference_mode():
        z, _ = model.encode(x, LABELS)
        torch.compiler.reset()
        counters.clear()
        model.compile(backend="eager", dynamic=False)
        torch.testing.assert_close(model.encode(x, LABELS)[0], z)
        assert counters["stats"]["unique_graphs"] == 1
        assert (model.decode(z, LABELS) - x).abs().max() < 1e-4
        assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_logdet_is_the_jacobians_in_nats_per_dimension() -> None:
    model, x = flow((2, 4, 4), dtype=torch.float64), images(2, (2, 4, 4), torch.float64)
    y = torch.tensor([1, -1])
    _, logdet = model.encode(x, y)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda one, i=i: model.encode(one[None], y[i : i + 1])[0].flatten(), x[i]
        )
        expected = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet / 32
        torch.testing.assert_close(logdet[i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_tokens_parameters_depend_on_exactly_the_tokens_before_it(reverse: bool) -> None:
    block = flow(blocks=2).blocks[int(reverse)]
    assert isinstance(block, MetaBlock)
    u = torch.randn(1, 16, 4)
    a, m = block.scale_and_shift(u, torch.tensor([1]))
    assert not a[:, 0].any()
    assert not m[:, 0].any()
    for t in range(16):
        changed = u.clone()
        changed[:, t:] += torch.randn(1, 16 - t, 4)
        moved = torch.cat(block.scale_and_shift(changed, torch.tensor([1])), dim=-1)
        moved = moved - torch.cat([a, m], dim=-1)
        assert moved[:, : t + 1].abs().max() < 1e-6
        assert t == 15 or moved[:, t + 1].abs().max() > 1e-3, "token t must be seen by token t + 1"


def test_odd_blocks_run_from_the_last_token_with_their_positions() -> None:
    x, y = images(1), torch.tensor([0])
    for blocks, last in ((1, (slice(6, 8), slice(6, 8))), (2, (slice(0, 2), slice(0, 2)))):
        model = flow(blocks=blocks)
        z, _ = model.encode(x, y)
        with torch.no_grad():  # nothing comes after a block's last token, so its position moves nothing
            model.blocks[-1].positions[-1 if blocks == 1 else 0] += torch.randn(32)
            torch.testing.assert_close(model.encode(x, y)[0], z)
            model.blocks[-1].positions[0 if blocks == 1 else -1] += torch.randn(32)
        moved = (model.encode(x, y)[0] - z).abs()[0, 0]
        assert moved[last].max() > 1e-3
    first = flow(blocks=1)
    assert torch.equal(first.encode(x, y)[0][..., :2, :2], x[..., :2, :2]), "the first token passes unchanged"


def naive_inverse(block: MetaBlock, z: Tensor, y: Tensor, guidance: float) -> Tensor:
    """The definition: every token from the whole parallel pass over what is decoded so far."""
    z = z.flip(1) if block.reverse else z
    u = z.clone()
    for t in range(1, z.shape[1]):
        a, m = block.scale_and_shift(u, y)
        a_dropped, m_dropped = block.scale_and_shift(u, torch.full_like(y, -1))
        g = guidance * t / (z.shape[1] - 1)
        a, m = a + g * (a - a_dropped), m + g * (m - m_dropped)
        u[:, t] = z[:, t] * torch.exp(a[:, t]) + m[:, t]
    return u.flip(1) if block.reverse else u


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("index", [0, 1])
def test_the_cached_inverse_is_the_naive_inverse(guidance: float, index: int) -> None:
    block = flow(dtype=torch.float64).blocks[index]
    assert isinstance(block, MetaBlock)
    z = torch.randn(5, 16, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = naive_inverse(block, z, LABELS, guidance)
        torch.testing.assert_close(block.inverse(z, LABELS, Guidance(guidance)), expected, rtol=0, atol=1e-10)


def test_a_dropped_label_is_the_mean_of_the_classes_with_its_gradient() -> None:
    model, x = flow(blocks=1), images(1)
    dropped, _ = model.encode(x, torch.tensor([-1]))
    torch.testing.assert_close(dropped, model.encode(x)[0])
    dropped.sum().backward()
    table = model.blocks[0].classes
    assert isinstance(table, Tensor)
    assert table.grad is not None
    assert table.grad.abs().max() > 0
    torch.testing.assert_close(table.grad[0], table.grad[2])
    with torch.no_grad():
        table[:] = table.mean(0, keepdim=True)
    torch.testing.assert_close(model.encode(x, torch.tensor([2]))[0], dropped)


def test_an_unconditional_flow_ignores_labels() -> None:
    model, x = flow(classes=0), images(5)
    z, _ = model.encode(x, LABELS)
    torch.testing.assert_close(z, model.encode(x)[0])
    torch.testing.assert_close(model.decode(z, LABELS, guidance=2.0), x, rtol=0, atol=1e-4)


def test_token_features_are_channel_major_in_raster_order() -> None:
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    model = flow((2, 4, 6))
    tokens = model._patches(x)
    for row, column, c, i, j in [(0, 0, 0, 0, 0), (1, 2, 1, 0, 1), (0, 1, 1, 1, 0)]:
        assert tokens[0, row * 3 + column, c * 4 + i * 2 + j] == x[0, c, 2 * row + i, 2 * column + j]
    assert torch.equal(model._image(tokens), x)


def test_under_bfloat16_autocast_scale_shift_and_logdet_stay_float32() -> None:
    model, x = flow(), images(5)
    z, logdet = model.encode(x, LABELS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        a, m = model.blocks[0](torch.randn(5, 16, 4), LABELS)
        z_half, logdet_half = model.encode(x, LABELS)
        back = model.decode(z_half, LABELS)
    assert {t.dtype for t in (a, m, z_half, logdet_half)} == {torch.float32}
    assert (z_half - z).abs().mean() < 0.05
    assert back.isfinite().all()
    assert (logdet_half - logdet).abs().max() < 0.01


def test_a_new_flow_has_zero_head_weights_and_free_biases() -> None:
    for block in TarFlow((1, 8, 8), 3, 2, channels=32, blocks=2, layers=1, head_size=16).blocks:
        assert isinstance(block, MetaBlock)
        assert not block.head.weight.any()
        assert block.head.bias.any()


def test_bits_per_dim_is_the_code_length_of_a_level_of_255() -> None:
    z = torch.tensor([[0.3, -1.2]])
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = -torch.log2(density * 2 / 255).mean()
    torch.testing.assert_close(bits_per_dim(nll_per_dim(z, torch.zeros(1)))[0], expected)


def test_denoise_takes_the_score_step_of_a_gaussian() -> None:
    model, x = TarFlow((1, 8, 8), 3, 2, channels=32, blocks=2, layers=1, head_size=16), images(5)
    for block in model.blocks:
        assert isinstance(block, MetaBlock)
        torch.nn.init.zeros_(block.head.bias)  # z = x, so p is N(0, I) and its score is -x
    with torch.no_grad():
        torch.testing.assert_close(denoise(model, x, LABELS, eta=0.5), x * (1 - 0.5**2))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_impossible_sizes_are_refused_with_the_field_and_value() -> None:
    with pytest.raises(ValueError, match="patch = 3 does not divide the image 8 x 8"):
        TarFlow((1, 8, 8), 0, 3, channels=64, blocks=1, layers=1)
    with pytest.raises(ValueError, match="channels = 96 is not a multiple of head_size = 64"):
        TarFlow((1, 8, 8), 0, 2, channels=96, blocks=1, layers=1)
