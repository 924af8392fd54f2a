"""Damaged files of many images are refused by name, or images are set aside: no traceback, none lost in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nfm.stages.base import StageError
from nfm.stages.data.sources import Parquet, WebDataset
from tests.stages.data.sources.test_parquet import table, write
from tests.stages.data.sources.test_webdataset import good, pack
from tests.support.recorder import Recorder

ROWS, DAMAGES = 6, 40


@pytest.mark.parametrize("source", [WebDataset, Parquet])
def test_random_damage_is_refused_by_name_or_sets_images_aside(
    tmp_path: Path, source: type[WebDataset | Parquet]
) -> None:
    rng = np.random.default_rng(0)
    if source is WebDataset:
        file = pack(tmp_path / "a.tar", good(ROWS))
    else:
        file = write(tmp_path / "a.parquet", table(ROWS), row_group_size=4)
    whole = file.read_bytes()
    held = len(whole.rstrip(b"\0"))
    refused: list[str] = []
    for _ in range(DAMAGES):
        damaged = bytearray(whole)
        for at in rng.integers(0, held, 3):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(bytes(damaged))
        opened = source(str(file))
        try:
            loaded = opened.load(np.arange(len(opened.keys)), tmp_path, Recorder())
        except StageError as error:
            refused.append(str(error))
            continue
        assert len(loaded.images) == len(opened.keys) >= ROWS  # a damaged name may make two samples of one
    assert len(refused) > DAMAGES // 4
    assert [told for told in refused if file.name not in told] == []
