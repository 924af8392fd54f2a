"""What a data stage costs is told of the source at hand: images that it decodes and writes as the stage does."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfm.stages.data import stage
from nfm.stages.data.config import DataConfig
from nfm.stages.trained.devices import timing
from nfm.stages.trained.devices.timing import Clock
from tests.stages.data import test_ingest as ingest
from tests.support.recorder import Recorder


@pytest.mark.parametrize("source", [ingest.folder, ingest.tars, ingest.rows_of_parquet])
def test_images_bytes_and_time_are_told_before_anything_is_made(
    tmp_path: Path, source: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.2)
    config: DataConfig = source(tmp_path)  # type: ignore[operator]
    said: list[str] = []
    cost = stage.cost(config, {}, Clock(said.append))
    assert said == ["timing the decoding of images here, 1 s at most ..."]
    assert cost.seconds is not None
    assert cost.seconds > 0
    assert "by 1 thread" in str(cost)
    (tmp_path / "out").mkdir()
    made = stage.run(config, {}, tmp_path / "out", Recorder())
    assert cost.count == made.metrics["images"] + made.metrics["heldout"] + made.metrics["rejected"]
    pixels = made.metrics["image_shape"]
    assert cost.bytes == cost.count * pixels[0] * pixels[1] * pixels[2]


def test_without_a_clock_nothing_is_decoded(tmp_path: Path) -> None:
    config = ingest.folder(tmp_path, bad=tuple(range(1, ingest.ROWS)))
    cost = stage.cost(config, {}, None)
    assert (cost.count, cost.seconds) == (ingest.ROWS, None)


def test_images_that_cannot_be_used_are_priced_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.2)
    cost = stage.cost(ingest.folder(tmp_path, bad=(3, 4)), {}, Clock(lambda _: None))
    assert cost.seconds is not None
