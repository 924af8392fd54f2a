"""Fixtures for tests of the sources of pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.stages.executors.ray_cluster import start_local
from tests.stages.pairs.shop import CUSTOM, Shop
from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures


@pytest.fixture
def shop(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """In a folder with a module of custom couplings."""
    (tmp_path / "own_couplings.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    yield Shop(tmp_path, tmp_path_factory)
    for name in [name for name in sys.modules if name.startswith("own_couplings_package")]:
        del sys.modules[name]


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """The one local Ray of all tests here that want one; executors must leave it running."""
    import ray

    start_local(4)
    yield
    assert ray.is_initialized()
    ray.shutdown()
