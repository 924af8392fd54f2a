"""A checkpoint that its authors' code wrote is the same flow here, and what is none is refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nfm.trainers.models import published
from nfm.trainers.models.tarflow import Guidance, TarFlow
from tests.support.authors_tarflow import Model, random

LABELS = torch.tensor([0, 2, -1, 1])


def pair(nvp: bool = True, classes: int = 3) -> tuple[Model, TarFlow]:
    """A flow of the authors' and ours of its state, both in float64."""
    torch.manual_seed(0)
    theirs = random(Model(2, 8, 2, 64, 3, 2, classes, nvp))
    state = theirs.state_dict()
    sizes = published.sizes_of(state)
    weights, prior = published.convert(state, sizes)
    ours = TarFlow(**published.architecture(sizes, (2, 8, 8)), prior=prior)
    ours.load_state_dict(weights)
    return theirs.double().eval(), ours.double().eval()


def images() -> Tensor:
    return torch.rand((4, 2, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("nvp", [True, False])
def test_noise_and_log_determinant_are_the_authors(nvp: bool, classes: int) -> None:
    theirs, ours = pair(nvp, classes)
    x, y = images(), LABELS if classes else None
    with torch.no_grad():
        (z, logdet), (own_z, own_logdet) = theirs(x, y), ours.encode(x, y)
    z, logdet = z / theirs.var.sqrt(), logdet - theirs.var.log().mean() / 2
    assert (theirs.image(z) - own_z).abs().max() < 1e-12
    assert (logdet - own_logdet).abs().max() < 1e-12
    assert (own_z - x).abs().mean() > 0.2, "too near the identity to show anything"


@pytest.mark.parametrize(
    ("classes", "guidance", "theirs"),
    [
        (3, Guidance(), {}),
        (3, Guidance(1.5), {"guidance": 1.5, "annealed": True}),
        (3, Guidance(1.5, ramp=False), {"guidance": 1.5}),
        (3, Guidance(1.5, of="a"), {"guidance": 1.5, "annealed": True, "what": "a"}),
        (3, Guidance(1.5, of="m"), {"guidance": 1.5, "annealed": True, "what": "b"}),
        (3, Guidance(1.0, temperature=1.5), {"guidance": 1.0, "annealed": True, "temperature": 1.5}),
        (0, Guidance(1.0, temperature=0.5), {"guidance": 1.0, "annealed": True, "temperature": 0.5}),
        (0, Guidance(2.0, False, 1.5, "m"), {"guidance": 2.0, "temperature": 1.5, "what": "b"}),
    ],
)
@pytest.mark.parametrize("nvp", [True, False])
def test_samples_with_every_option_are_the_authors(
    nvp: bool, classes: int, guidance: Guidance, theirs: dict[str, Any]
) -> None:
    published_flow, ours = pair(nvp, classes)
    y = LABELS.clamp(min=0) if classes else None
    z = torch.randn((4, 16, 8), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = published_flow.reverse(z, y, **theirs)
    found = ours.decode(published_flow.image(z), y, guidance)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    plain = ours.decode(published_flow.image(z), y)
    changes_nothing = guidance == Guidance() or (not nvp and guidance.of == "a")
    assert torch.equal(found, plain) == changes_nothing, "an option that changes nothing shows nothing"


def test_guidance_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature = 0\.0 of the attention: it is above 0"):
        Guidance(1.0, temperature=0.0)
    with pytest.raises(ValueError, match="of = 'b': guided are"):
        Guidance(1.0, of="b")  # type: ignore[arg-type]


def loaded(path: Path) -> tuple[dict[str, Tensor], bool]:
    state = published.read(path)
    return published.convert(state, published.sizes_of(state))


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("blocks.0.proj_in.weight"), r"it has no tensor blocks\.0\.proj_in\.weight"),
        (drop("blocks.1.attn_blocks.0.mlp.norm.bias"), r"1 of its tensors are missing: blocks\.1\.attn_blocks\.0\.mlp"),
        (drop("blocks.1.class_embed"), r"1 of its tensors are missing: blocks\.1\.class_embed"),
        (put("blocks.0.extra", torch.ones(1)), r"1 tensors that no TarFlow of its authors has: blocks\.0\.extra"),
        (put("blocks.1.pos_embed", torch.ones(9, 64)), r"blocks\.1\.pos_embed is 9x64, .* be 16x64"),
        (put("blocks.0.pos_embed", torch.ones(9)), "blocks.0 has tensors of shapes"),
        (put("blocks.0.proj_out.bias", torch.ones(16).long()), "is of torch.int64, weights are floats"),
        (put("blocks.0.proj_in.bias", torch.full((64,), torch.nan)), "values that are not finite"),
        (put("blocks.0.attn_mask", torch.ones(16, 16)), "is not the causal mask"),
        (put("var", torch.zeros(16, 8)), "var has values that are no variance"),
        (lambda state: {"model": state}, "holds more than named tensors"),
        (lambda state: [1, 2], "holds more than named tensors"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    torch.save(change(Model(2, 8, 2, 64, 2, 1, 3).state_dict()), tmp_path / "flow.pth")
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "flow.pth")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_runs(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": Trap(tmp_path / "ran")}, tmp_path / "trap.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds Python objects beside tensors, and to load them would run its code"):
        published.read(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"PK\x03\x04" + bytes(40), b"\x80\x02}."])
def test_other_bytes_are_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"no file of torch\.save|it has no tensor"):
        loaded(tmp_path / "file.pth")


def test_files_of_both_formats_and_of_half_precision_are_read(tmp_path: Path) -> None:
    state = Model(2, 8, 2, 64, 2, 1).state_dict()
    for name, zipped in (("new", True), ("old", False)):
        halved = {key: value.bfloat16() for key, value in state.items()}
        torch.save(halved, tmp_path / name, _use_new_zipfile_serialization=zipped)
        weights, prior = loaded(tmp_path / name)
        assert not prior
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert torch.equal(weights["blocks.1.embed.weight"], halved["blocks.1.proj_in.weight"].float())


def test_eta_stands_in_the_name_as_the_authors_training_writes_it() -> None:
    sizes = published.sizes_of(Model(3, 8, 2, 64, 2, 1).state_dict())
    assert published.eta_of("afhq_model_2_64_2_1_0.07.pth", sizes) == 0.07
    assert published.eta_of("mine.pth", sizes) is None
    for name, message in (
        ("x_model_2_64_8_8_0.07.pth", "its name says patch, channels, blocks and layers 2, 64, 8, 8, its tensors have"),
        ("x_model_4_64_2_1_0.07.pth", "2, 1: give --eta"),
        ("x_model_2_64_2_1_uniform.pth", "by its name it was trained with noise uniform"),
        ("x_model_2_64_2_1_0.00.pth", "trained with noise 0.00"),
    ):
        with pytest.raises(ValueError, match=message):
            published.eta_of(name, sizes)


def test_images_of_another_shape_are_refused_with_the_shapes_that_would_be() -> None:
    sizes = published.sizes_of(Model(3, 8, 2, 64, 2, 1).state_dict())
    assert published.architecture(sizes, (3, 8, 8))["patch"] == 2
    assert published.architecture(sizes, (3, 4, 16))["patch"] == 2
    for shape in ((1, 8, 8), (3, 16, 16), (4, 8, 8), (16, 8, 8)):
        with pytest.raises(ValueError, match="16 patches of 12 values, for instance images 3x8x8; the data's"):
            published.architecture(sizes, shape)
