"""Latents are of every image, once as it is and once mirrored, in the order of the data; a killed run goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nfm.stages.base import StageError, Stopped, Unfit
from nfm.stages.data import records
from nfm.stages.data.latents import shards
from nfm.stages.display.pictures import to_uint8
from nfm.stages.trained.foreign import vae
from nfm.storage import ImageDataset
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from tests.stages.data.latents.small import HELDOUT, ROWS, make, write_data
from tests.support.recorder import Recorder


def decoded(out: Path, split: str) -> np.ndarray:
    """The uint8 images that the artifact's own VAE makes of its latents, in their order."""
    latents = ImageDataset.open(out, split)
    model, _ = vae.of_artifact(out, "cpu")
    return to_uint8(model.decode(torch.from_numpy(latents.images(np.arange(len(latents))))).numpy())


def test_row_by_row_they_decode_to_the_images_and_then_to_their_mirror_images(place: Path, data: Path) -> None:
    result = make(place / "out", data, mirrors=True)
    for split, rows in (("train", ROWS), ("heldout", HELDOUT)):
        source, latents = ImageDataset.open(data, split), ImageDataset.open(place / "out", split)
        own = np.arange(rows)
        images, twice = source.images(own), 2 if split == "train" else 1
        expected = np.concatenate([images, images[..., ::-1]][:twice])
        assert (latents.dtype, latents.image_shape, len(latents)) == ("float16", (12, 2, 3), twice * rows)
        assert (latents.image_scale, latents.image_shift) == (2.0, 0.125)
        np.testing.assert_array_equal(decoded(place / "out", split), expected)
        every = np.arange(len(latents))
        np.testing.assert_array_equal(latents.labels(every), np.tile(source.labels(own), twice))
        keys = source.keys(own)
        assert latents.keys(every) == [*keys, *(f"{key}{shards.MIRRORED}" for key in keys)][: len(every)]
        assert latents.captions(every) == source.captions(own) * twice
    assert result.metrics["images"] == 2 * ROWS
    assert result.metrics["reconstruction"] < 1e-3
    assert result.extra["dataset"] == {"name": "small"}


def test_without_mirrors_there_is_a_row_an_image_and_no_captions_where_the_data_has_none(place: Path) -> None:
    data = write_data(place / "plain", captions=False)
    make(place / "out", data)
    assert len(ImageDataset.open(place / "out", "train")) == ROWS
    with pytest.raises(StorageError, match="no captions"):
        ImageDataset.open(place / "out", "train").captions([0])


def test_a_sample_is_of_its_row_alone_whatever_the_shards_and_batches(place: Path, data: Path) -> None:
    def latents(out: str, **config: object) -> np.ndarray:
        make(place / out, data, options={"std": 0.5}, **config)
        return ImageDataset.open(place / out, "train").images(np.arange(ROWS)).astype(np.float32)

    first = latents("first", mirrors=True)
    np.testing.assert_array_equal(first, latents("other", rows_per_shard=4, batch_size=7))
    mode = latents("mode", posterior="mode")
    noise = (first - mode) / 2.0
    assert noise.std() == pytest.approx(0.5, rel=0.1)
    assert not np.array_equal(first, latents("seed", seed=1))
    np.testing.assert_allclose(mode, latents("scaled", posterior="mode", scale=4.0, shift=0.0) / 2 - 0.25, atol=2e-3)


def test_a_stopped_run_keeps_its_shards_and_goes_on_to_the_same_content(place: Path, data: Path) -> None:
    whole = make(place / "whole", data, mirrors=True)
    out, kept = place / "out", {}
    for patience in range(4, 40, 6):
        try:
            result = make(out, data, report := Recorder(patience), mirrors=True)
        except Stopped:
            assert not (out / "dataset.json").exists()
            commits = {path.name: path.read_bytes() for path in (out / records.FOLDER).glob("*.json")}
            assert commits.items() >= kept.items(), "a committed shard is not encoded again"
            kept = commits
        else:
            break
    assert kept
    assert f"{len(kept)} of 6 shards are committed already" in report.said
    assert {name: result.digests[name] for name in result.payload} == {
        name: whole.digests[name] for name in whole.payload
    }


def test_a_run_killed_while_it_places_shards_goes_on(place: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(place / "whole", data)
    real, placed = atomic.place, []

    def killed(*arguments: object) -> None:
        if len(placed) == 2:
            raise KeyboardInterrupt
        placed.append(real(*arguments))  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "place", killed)
        with pytest.raises(KeyboardInterrupt):
            make(place / "out", data)
    (place / "out" / shards.ATTEMPTS / "train-s00000.dead.tar").write_bytes(b"of a killed worker")
    result = make(place / "out", data, report := Recorder())
    assert result.digests == whole.digests
    assert report.seen[0] == (ROWS + HELDOUT, ROWS + HELDOUT, "images"), "nothing is encoded again"


def test_of_two_that_encode_one_shard_the_first_commit_stands(place: Path, data: Path) -> None:
    make(out := place / "out", data)
    encoder = shards.LatentEncoder(out, data, "cpu")
    first = records.read(shards.Commit, out, "train-s00001")
    assert encoder.encode_shard(out, "train-s00001", 5, "later", out) == first
    assert not (out / shards.ATTEMPTS / "train-s00001.later.tar").exists()


def test_latents_that_float16_cannot_hold_are_refused_with_their_image(place: Path, data: Path) -> None:
    with pytest.raises(StageError, match=r"the latent of train image 'train/0' has values .* latents\.scale"):
        make(place / "out", data, scale=1e6)


@pytest.mark.parametrize(
    ("later", "said"),
    [
        ("x * float('nan')", r"latents.vae: encode gave NaN or an infinity for \w+ image '\w+/\d+', in float32; mend"),
        ("x[:, :2]", r"latents.vae: encode gave 2x4x6 for \w+ images, and 3x4x6 in its trial; give all latents one"),
    ],
)
def test_a_vae_that_goes_wrong_after_its_trial_is_named(place: Path, data: Path, later: str, said: str) -> None:
    (place / "later.py").write_text(
        f"import pathlib\nlater = pathlib.Path({str(place / 'later')!r})\nclass V:\n"
        f" def encode(self, x): return {later} if later.exists() else x\n"
        " def decode(self, z): return z\n"
        "def vae(shape): return V()"
    )
    make(place / "out", data, vae="later:vae")
    encoder = shards.LatentEncoder(place / "out", data, "cpu")
    (place / "later").touch()
    with pytest.raises(StageError, match=said):
        encoder.encode_shard(place / "again", "train-s00000", 5, "a", place / "again")


def test_latents_of_another_size_than_1_are_told_with_the_scale_that_suits(place: Path, data: Path) -> None:
    result = make(place / "out", data, report := Recorder(), scale=10.0)
    (said,) = [line for line in report.said if "standard deviation" in line]
    scale = float(said.rpartition("= ")[2])
    assert scale == pytest.approx(10.0 / result.metrics["latent_std"], rel=1e-3)


def test_data_that_is_no_pixels_and_a_vae_that_is_none_are_refused(place: Path) -> None:
    floats = write_data(place / "floats", dtype="float32")
    with pytest.raises(Unfit, match="float32 already, no pixels"):
        make(place / "out", floats)
    data, wrong = write_data(place / "data"), place / "wrong.py"
    for code, said in (
        ("def vae(shape): return 3", "returned int; return one that has encode and decode"),
        ("class V:\n encode = decode = staticmethod(lambda x: x.flatten(1))\n"
         "def vae(shape): return V()", "encode gave 2x72 for two images"),
        ("class V:\n encode = staticmethod(lambda x: x)\n decode = staticmethod(lambda x: x[:, :1])\n"
         "def vae(shape): return V()", "decode gave 2x1x4x6 for 2x3x4x6"),
        *((f"class V:\n encode = staticmethod(lambda x: {given})\n decode = staticmethod(lambda x: x)\n"
           "def vae(shape): return V()", said) for given, said in (
               ("(x, x, x)", "encode gave 3 values; give the mean, or"),
               ("None", "encode gave NoneType; give the mean, or"),
               ("(x, x[:, :1])", "a mean 2x3x4x6 and a deviation 2x1x4x6; give both one shape"),
               ("(100 * x).int()", "encode gave int32; give floats"),
               ("(x, 0 * x - 0.5)", "encode gave a deviation of -0.5; it is at least 0: of a log-variance give"),
               ("0 * x + 1", "encode gave one value everywhere"),
               *((text, "an image's latent depends on the images beside it")
                 for text in ("x - x.mean(0)", "x - x.mean()", "x / x.std()")),
               ("x / 0", "encode gave values that are not finite"))),
        ("class V:\n encode = staticmethod(lambda x: x)\n decode = staticmethod(lambda x: 100 * x)\n"
         "def vae(shape): return V()", "decode gave values up to 9"),
        ("class V:\n encode = decode = staticmethod(lambda x: x)\n scale = 'a'\n"
         "def vae(shape): return V()", "its scale is 'a'; give a number"),
        ("class V:\n encode = decode = staticmethod(lambda x: x)\n scale = '1'\n"
         "def vae(shape): return V()", "its scale is '1'; give a number"),
        ("def vae(): return V()", "it cannot be called with the image's shape: too many positional arguments"),
        ("def vae(shape): raise OSError('no weights')", "the function raised OSError: no weights"),
        ("class V:\n def encode(self, x): raise KeyError('a')\n def decode(self, z): return z\n"
         "def vae(shape): return V()", "cannot encode images of 3x4x6: it raised KeyError: 'a'"),
        ("class V:\n def encode(self, x): return x\n def decode(self, z): raise OSError('b')\n"
         "def vae(shape): return V()", "cannot decode latents of 3x4x6: it raised OSError: b"),
        ("import torch\nclass V(torch.nn.Module):\n"
         " def __init__(self):\n  super().__init__()\n  self.w = torch.nn.Parameter(torch.rand(3, 1, 1))\n"
         " def encode(self, x): return x * self.w\n def decode(self, z): return z / self.w\n"
         "def vae(shape): return V()", "it gives other weights each time it is called, and every worker calls it"),
    ):  # fmt: skip
        wrong.write_text(code)
        with pytest.raises(Unfit, match=said):
            make(place / "out", data, vae="wrong:vae")
