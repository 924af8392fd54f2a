"""Students of every variant and architecture: a few steps, an exact resume, the weights loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from nfm.stages.base import StageError, Stopped
from nfm.stages.couplings.facts import FACTS
from nfm.stages.couplings.variant import Variant
from nfm.stages.trained import student
from nfm.stages.trained.student import StudentConfig
from nfm.storage import PairWriter
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec
from nfm.trainers.checkpoint import pack_weights, unpack_weights
from nfm.trainers.models.sit import SiT
from nfm.trainers.models.unet import UNet
from tests.support.recorder import Recorder

SHAPE = (1, 6, 7)
TINY: dict[str, Any] = {"pairs": 96, "batch_size": 16, "width": 16, "depth": 1, "device": "cpu"}
SIT = {"patch": 1, "head_size": 16}
VARIANTS = {
    "nfm": SIT,
    "nfm:soften=0.5": SIT | {"soften": 0.5},
    "nfm:permuted": SIT | {"permuted": True},
    "nfm:independent=0.25": SIT | {"mixture": {"independent": 0.25}},
    "nfm:soften=0.5:permuted:independent=0.25": {
        "arch": "unet",
        "soften": 0.5,
        "permuted": True,
        "mixture": {"independent": 0.25},
    },
}


def write_store(root: Path, coupling: str, seed: int, source: str = "ab" * 32) -> Path:
    spec = StoreSpec(
        rows=40, rows_per_shard=20, rows_per_block=8, fields=pair_fields(SHAPE, "float16"), coupling=coupling,
        source=source, codec="float16", classes=3,
    )  # fmt: skip
    noise = np.random.default_rng(seed).standard_normal((40, *SHAPE), np.float32)
    image = np.stack([np.full(SHAPE, 5 * slot, np.uint8) for slot in range(40)])
    with PairWriter(root, spec) as writer:
        writer.write(image=image, noise=noise, label=np.arange(40) % 3, nll=np.full(40, 0.5, np.float32))
    return root


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        "pairs": write_store(folder / "nfm", "nfm", 0),
        "pairs:independent": write_store(folder / "independent", "independent", 1),
    }


def trained(config: StudentConfig, inputs: dict[str, Path], out: Path, patience: int = 1_000_000) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return student.run(config, inputs, out, Recorder(patience)).metrics


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_that_was_stopped_and_resumed_is_the_same_bit_for_bit(
    variant: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    config = StudentConfig(**TINY | VARIANTS[variant])
    metrics = trained(config, inputs, tmp_path / "whole")
    assert (metrics["variant"], metrics["coupling"]) == (variant, "nfm")
    with pytest.raises(Stopped):
        trained(config, inputs, tmp_path / "stopped", patience=3)
    (state,) = (tmp_path / "stopped" / "checkpoints").glob("*/state.json")
    assert 0 < json.loads(state.read_text())["examples_seen"] < 96
    trained(config, inputs, tmp_path / "stopped")
    whole, resumed = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == resumed
    model = student.load(tmp_path / "whole")
    assert isinstance(model, UNet if config.arch == "unet" else SiT)
    assert not model.training
    label = torch.tensor([0, -1])
    assert model(torch.zeros(2, *SHAPE), torch.rand(2), label).shape == (2, *SHAPE)


def test_every_variant_learns_from_other_pairs(inputs: dict[str, Path], tmp_path: Path) -> None:
    losses = {}
    for number, (variant, options) in enumerate(VARIANTS.items()):
        losses[variant] = trained(StudentConfig(**TINY | options), inputs, tmp_path / str(number))["loss"]
    # The combined variant is a U-Net's: it differs from a U-Net on plain pairs too, not from transformers alone.
    losses["U-Net"] = trained(StudentConfig(**TINY, arch="unet"), inputs, tmp_path / "unet")["loss"]
    assert len(set(losses.values())) == len(losses)


def test_a_checkpoint_of_another_rho_is_not_gone_on_with(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        trained(StudentConfig(**TINY | SIT), inputs, tmp_path, patience=3)
    with pytest.raises(Exception, match=r"soften is 0\.0 there and 0\.5 here"):
        trained(StudentConfig(**TINY | SIT, soften=0.5), inputs, tmp_path)


def test_the_permuted_control_gives_each_image_the_next_noise_of_its_batch(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nfm.trainers import flow_matching

    met: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    loss = flow_matching.loss
    for name, permuted in (("plain", False), ("permuted", True)):
        pairs = met.setdefault(name, [])

        def spy(model: Any, image: Any, noise: Any, *rest: Any, pairs: Any = pairs) -> Any:
            pairs.append((image.clone(), noise.clone()))
            return loss(model, image, noise, *rest)

        monkeypatch.setattr(flow_matching, "loss", spy)
        trained(StudentConfig(**TINY | SIT, permuted=permuted), inputs, tmp_path / name)
    for (image, noise), (image_too, shuffled) in zip(met["plain"], met["permuted"], strict=True):
        assert torch.equal(image, image_too)
        assert torch.equal(shuffled, noise.roll(1, 0))
        assert not torch.equal(shuffled, noise)


def test_the_fingerprints_of_earlier_students_stay_valid() -> None:
    assert StudentConfig().semantic() == {
        "seed": 0, "batch_size": 128, "learning_rate": 1e-3, "warmup": 0.05, "weight_decay": 1e-4, "clip": 1.0,
        "ema": 0.999, "precision": "float32", "pairs": 240_000, "patch": 4, "width": 128, "depth": 6,
        "head_size": 64, "label_drop": 0.1,
    }  # fmt: skip
    new = {"arch": "unet", "soften": 0.5, "permuted": True, "mixture": {"independent": 0.25}}
    assert new.items() <= StudentConfig(**new).semantic().items()


def test_weights_of_before_there_were_architectures_are_a_transformers(tmp_path: Path) -> None:
    sizes = {"image_shape": [1, 8, 8], "classes": 3, "patch": 2, "width": 32, "depth": 1, "head_size": 32}
    torch.manual_seed(0)
    model = SiT(**sizes)  # type: ignore[arg-type]
    (tmp_path / "weights.safetensors").write_bytes(pack_weights(model, sizes))
    loaded = student.load(tmp_path)
    assert isinstance(loaded, SiT)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_transformers_weights_say_what_they_always_said(inputs: dict[str, Path], tmp_path: Path) -> None:
    trained(StudentConfig(**TINY | SIT), inputs, tmp_path)
    _, architecture = unpack_weights((tmp_path / "weights.safetensors").read_bytes())
    assert architecture == {"image_shape": list(SHAPE), "classes": 3, "width": 16, "depth": 1} | SIT


def test_a_u_net_has_its_own_default_size() -> None:
    sizes = {arch: (StudentConfig(arch=arch).width, StudentConfig(arch=arch).depth) for arch in ("sit", "unet")}
    assert sizes == {"sit": (128, 6), "unet": (32, 1)}
    assert StudentConfig(arch="unet", width=64).depth == 1
    assert StudentConfig(**StudentConfig(arch="unet", width=64).semantic()).width == 64


def test_a_u_net_of_its_default_size_costs_about_what_the_default_transformer_does() -> None:
    for side, patch in ((14, 2), (28, 4)):
        transformer = student.flops(StudentConfig(patch=patch), (1, side, side))
        assert 0.4 < student.flops(StudentConfig(arch="unet"), (1, side, side)) / transformer < 2.5
    cost = student.cost(StudentConfig(arch="unet"), {"image_shape": [1, 14, 14]}, None)
    assert (cost.count, cost.unit) == (240_000, "pairs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mlp"}, "'sit' or 'unet'"),
        ({"soften": 1.0}, r"soften is 1\.0, it lies in \[0, 0\.9999\]"),
        ({"soften": -0.1}, r"soften is -0\.1, it lies in"),
        ({"mixture": {"somebody": 0.2}}, "coupling 'somebody' is unknown"),
        ({"mixture": {"independent": 1.2}}, r"shares \(independent 1\.2\) .*together below 1"),
        ({"mixture": {"independent": 0.9999999}}, r"at most 0\.9999; what is left is the share of the store itself"),
        ({"mixture": {"independent": 0.0}}, "above 0"),
        ({"permuted": True, "batch_size": 1}, "batch_size of at least 2, not 1"),
    ],
)
def test_wrong_options_are_refused_with_their_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig(**options)


def test_a_mixture_that_does_not_fit_its_stores_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match="nfm is mixed with itself"):
        trained(StudentConfig(**TINY | SIT, mixture={"nfm": 0.2}), inputs, tmp_path)
    wrong = {"pairs": inputs["pairs"], "pairs:independent": inputs["pairs"]}
    with pytest.raises(StageError, match=r"coupling nfm, and student\.mixture wants independent"):
        trained(StudentConfig(**TINY | SIT, mixture={"independent": 0.2}), wrong, tmp_path)
    with pytest.raises(StageError, match=r"config section \[student\]: width = 20 of a U-Net"):
        trained(StudentConfig(**TINY | {"arch": "unet", "width": 20}), inputs, tmp_path)


def test_a_mixture_of_stores_of_another_order_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", "independent", 1, source="cd" * 32)
    strange = {"pairs": inputs["pairs"], "pairs:independent": other}
    with pytest.raises(StageError, match=r"its order key .* is not that of .*same pairs.draws and rows"):
        trained(StudentConfig(**TINY | SIT, mixture={"independent": 0.2}), strange, tmp_path / "out")


def test_an_error_about_reader_options_names_only_couplings_of_the_config() -> None:
    for options in ({"mixture": {"independent": 1.2}}, {"soften": 2.0}):
        with pytest.raises(ValidationError) as caught:
            StudentConfig(**options)
        told = caught.value.errors()[0]["msg"]
        assert not [name for name in FACTS if name in told and name != "independent"]


def test_a_variant_is_spelled_so_that_it_is_read_as_itself() -> None:
    for text in ("nfm:soften=0.5", "nfm:independent=0.2", "nfm:soften=0.1:permuted:custom=0.3:reflow=0.1"):
        assert str(Variant.parse(text)) == text
    for number in (1 / 3, 0.1 + 0.2, 0.9998999, 1e-4, 0.123456789):
        for variant in (Variant("nfm", soften=number), Variant("nfm", mixture={"independent": number})):
            assert Variant.parse(str(variant)) == variant
    assert str(Variant.parse("nfm:soften=0.50")) == "nfm:soften=0.5"
    for text, said in (
        ("nfm:soften=0.9999999", "soften is 0.9999999"),
        ("nfm:independent=0.9999999", "independent 0.9999999"),
        ("nfm:independent=0.00001", "at least 0.0001"),
        ("nfm:soften=nan", "is no option"),
        ("nfm:soften=0.1:soften=0.1", "soften is given twice"),
    ):
        with pytest.raises(ValueError, match=said):
            Variant.parse(text)
