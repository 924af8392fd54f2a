"""diffusers' AutoencoderKL in a local folder: known by its content, kept beside its latents, read without a network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.stages.base import StageError, Unfit
from nfm.stages.data.latents import stage
from nfm.stages.data.latents.config import LatentsConfig
from nfm.stages.trained.devices import timing
from nfm.stages.trained.devices.timing import Clock
from nfm.stages.trained.foreign import vae
from nfm.storage import ImageDataset
from tests.stages.data.latents.small import ROWS, make, save_vae, write_data
from tests.support.torchvision_stub import make_importable

pytest.importorskip("diffusers", reason="diffusers is not installed: the extra `latents`")


@pytest.fixture(scope="module")
def kl() -> Any:
    make_importable()
    from diffusers import AutoencoderKL

    return AutoencoderKL


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl") / "vae"
    save_vae(folder, 3)
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("alone")
def test_latents_are_those_of_diffusers_and_their_own_copy_decodes(kl: Any, saved: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", (3, 8, 4))
    moved = shutil.copytree(saved, tmp_path / "elsewhere")
    out = tmp_path / "out"
    result = make(out, data, vae=str(moved), posterior="mode", batch_size=ROWS)
    shutil.rmtree(moved)

    model = kl.from_pretrained(saved).eval()
    source = ImageDataset.open(data, "train")
    images = torch.from_numpy(source.to_float(source.images(np.arange(ROWS))))
    with torch.no_grad():
        mean = model.encode(images).latent_dist.mean
        expected = (mean - 0.25) * 0.18215
        latents = ImageDataset.open(out, "train")
        found = torch.from_numpy(latents.images(np.arange(ROWS)))
        torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=2e-3)
        assert latents.image_shape == (4, 4, 2)
        assert latents.image_decoder == f"AutoencoderKL {vae.digest_of(saved)}"
        own, facts = vae.of_artifact(out, "cpu")
        torch.testing.assert_close(own.decode(found), model.decode(found.float() / 0.18215 + 0.25).sample)
    assert (facts.scale, facts.shift) == (0.18215, 0.25)
    assert {f"vae/{name}" for name in (vae.CONFIG, vae.WEIGHTS)} <= set(result.files)
    kept = out / "vae" / vae.WEIGHTS
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    with pytest.raises(StageError, match="not the VAE that made these latents"):
        vae.of_artifact(out, "cpu")


def test_a_vae_is_known_by_its_content_and_not_by_its_path(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    config = json.loads((copy / vae.CONFIG).read_text()) | {"_name_or_path": "/some/where", "_diffusers_version": "9"}
    (copy / vae.CONFIG).write_text(json.dumps(config))
    assert vae.identity(str(copy)) == vae.identity(str(saved))
    assert LatentsConfig(vae=str(copy)).semantic() == LatentsConfig(vae=str(saved)).semantic()

    (copy / vae.CONFIG).write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert vae.identity(str(copy)) != vae.identity(str(saved))
    shutil.copy(saved / vae.CONFIG, copy)
    weights = bytearray((copy / vae.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (copy / vae.WEIGHTS).write_bytes(weights)
    assert vae.identity(str(copy)) != vae.identity(str(saved))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / vae.CONFIG).unlink(), "it has no config.json; name the folder of an AutoencoderKL"),
        (lambda folder: (folder / vae.CONFIG).write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / vae.CONFIG).write_text('{"_class_name": "UNet"}'), "is none of an AutoencoderKL"),
        (lambda folder: (folder / vae.WEIGHTS).unlink(), "it has no diffusion_pytorch_model.safetensors; .* pickles"),
        (lambda folder: _change(folder, latents_mean=[0.0]), "wrap it in a function"),
        (lambda folder: _change(folder, in_channels=None), "lacks in_channels, latent_channels or block_out_channels"),
    ],
)
def test_a_folder_that_is_no_such_vae_is_refused(change: Any, said: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    change(folder)
    with pytest.raises(Unfit, match=rf"latents\.vae = .*copy'.*{said}"):
        vae.identity(str(folder))


def test_a_file_of_code_is_told_how_a_function_in_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def vae(shape): ...")
    with pytest.raises(Unfit, match=r"mine\.py': a file; name the function in it, as `mine:function`"):
        vae.identity(str(tmp_path / "mine.py"))


def _change(folder: Path, **values: object) -> None:
    config = json.loads((folder / vae.CONFIG).read_text())
    (folder / vae.CONFIG).write_text(json.dumps(config | values))


def test_the_folder_of_a_whole_model_is_told_where_its_vae_is(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model" / "vae")
    with pytest.raises(Unfit, match=r"did you mean .*model/vae"):
        vae.identity(str(tmp_path / "model"))


def test_images_that_it_does_not_take_are_refused_before_anything_is_made(saved: Path) -> None:
    assert vae.latent_shape(str(saved), (3, 8, 4)) == (4, 4, 2)
    with pytest.raises(Unfit, match=r"takes images of 3 channels, the data has 1x8x8; set data\.channels = 3"):
        vae.latent_shape(str(saved), (1, 8, 8))
    with pytest.raises(Unfit, match=r"multiples of 2, the data has 3x7x8; set data\.image_size"):
        vae.latent_shape(str(saved), (3, 7, 8))


def test_weights_that_do_not_fit_their_config_are_refused_by_name(saved: Path, kl: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    _change(folder, latent_channels=8)
    with pytest.raises(Unfit, match=r"latents\.vae: .*copy: cannot be read as an AutoencoderKL"):
        vae.load(str(folder), (3, 8, 8), {}, "cpu", "float32")


def test_its_time_and_its_flops_are_told_before_anything_is_made(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.2)
    facts = {"images": 10, "heldout": 2, "image_shape": [3, 8, 8]}
    config = LatentsConfig.model_validate({"vae": str(saved), "mirrors": True, "batch_size": 4})
    said: list[str] = []
    found = stage.cost(config, facts, Clock(said.append))
    assert said == ["timing the encoding of images to latents on this device in float32, 1 s at most ..."]
    assert (found.count, found.bytes) == (22, 22 * 4 * 4 * 4 * 2)
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.flops is not None
    larger = stage.cost(config, facts | {"image_shape": [3, 16, 16]}, Clock(said.append)).flops
    assert larger is not None
    assert larger > 3 * found.flops > 0
    assert stage.cost(config, facts, None).seconds is None
