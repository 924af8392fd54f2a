"""Shards of latents are encoded by the executors of pairs; where the work ran never shows in the result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from nfm.stages.base import StageError
from nfm.stages.data.latents.config import LatentsConfig
from nfm.storage import ImageDataset
from tests.stages.data.latents.small import FOLDED, make
from tests.support.recorder import Recorder


@pytest.mark.ray
@pytest.mark.seconds(60)
@pytest.mark.usefixtures("cluster")
def test_workers_of_ray_make_the_same_bytes_although_one_is_killed(place: Path, data: Path) -> None:
    (place / "mine_vae.py").write_text(dying(place))
    serial = make(place / "serial", data, mirrors=True)
    (place / "armed").touch()
    result = make(place / "ray", data, report := Recorder(), mirrors=True, executor="ray", workers=1)
    assert not (place / "armed").exists(), "a worker was killed"
    assert any("lost Ray actor" in line for line in report.said)
    assert result.digests == serial.digests
    assert report.seen[-1] == (26, 26, "images")


def dying(place: Path) -> str:
    """The folding VAE, which kills its process once, in a worker, when a file says so."""
    kill = f"""
        armed = pathlib.Path({str(place / "armed")!r})
        if len(x) == 3 and armed.exists() and os.getpid() != {os.getpid()}:
            armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
"""
    return FOLDED.replace("import torch\n", "import os\nimport signal\nimport torch\n").replace(
        "    def encode(self, x):\n", f"    def encode(self, x):{kill}"
    )


def test_a_shard_that_fails_is_told_and_the_others_stay(place: Path, data: Path) -> None:
    source = ImageDataset.open(data, "train")
    first = float(source.to_float(source.images([5])).ravel()[0])  # of the second shard
    fails = f"""
        if len(x) == 3 and pathlib.Path("broken").exists() and float(x.flatten()[0]) == {first!r}:
            raise ValueError("no such kernel")
"""
    (place / "mine_vae.py").write_text(
        FOLDED.replace("    def encode(self, x):\n", f"    def encode(self, x):{fails}"),
    )
    (place / "broken").touch()
    with pytest.raises(StageError) as caught:
        make(place / "out", data)
    told = str(caught.value)
    assert told.startswith("1 of 4 shards of latents are missing: train-s00001 (")
    assert "ValueError: no such kernel" in told
    assert "run the same command again" in told
    (place / "broken").unlink()
    make(place / "out", data, report := Recorder())
    assert "3 of 4 shards are committed already" in report.said


@pytest.mark.parametrize("field", [{"mirrors": True}, {"scale": 2.0}, {"options": {"std": 1.0}}])
def test_a_setting_of_latents_without_a_vae_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(field))} is of latents, and without vae there are none"):
        LatentsConfig.model_validate(field)
    assert LatentsConfig(ray_address="head:6379", executor="serial").vae is None
