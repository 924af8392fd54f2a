"""Tiny stores of coupled pairs in each layout, and the examples as modules and as the scripts that they are."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nfm.storage import PairWriter, StoreSpec
from nfm.storage.format.fields import pair_fields
from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
ROWS = 600


def make_store(root: Path, layout: str) -> Path:
    """600 pairs of 1x4x4 in two draws: the image is 0.25 z, rounded to uint8, so that a network can learn the way."""
    spec = StoreSpec(
        rows=ROWS,
        rows_per_shard=256,
        rows_per_block=64,
        fields=pair_fields((1, 4, 4)),
        coupling="independent",
        source="ab" * 32,
        classes=10,
        layout=layout,
    )
    with PairWriter(root, spec, draws=2) as writer:
        for draw in range(2):
            noise = np.random.default_rng(draw).standard_normal((ROWS, 1, 4, 4), np.float32)
            image = np.clip(np.rint(127.5 + 127.5 * 0.25 * noise), 0, 255).astype(np.uint8)
            writer.write(image=image, noise=noise, label=np.arange(ROWS) % 10, draw=draw)
    return root


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """store("zarr") -> the root of a sealed store of that layout; tests only read it."""
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def get(layout: str = "blocks") -> Path:
        if layout not in made:
            made[layout] = make_store(folder / layout, layout)
        return made[layout]

    return get


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """example("sit_transport") -> examples/sit_transport.py as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """script("stock_zarr.py", store) -> what `python examples/stock_zarr.py STORE` prints."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run
