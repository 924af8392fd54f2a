"""A folder with the module of a VAE of one's own, and images to encode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.data.latents.small import FOLDED, write_data


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine_vae.py").write_text(FOLDED)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine_vae", None)


@pytest.fixture
def data(place: Path) -> Path:
    return write_data(place / "data")
