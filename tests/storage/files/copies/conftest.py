"""An artifact in a bucket, on whose first machine a test runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path


@pytest.fixture
def artifact(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of an artifact in a bucket, begun and not finished."""
    monkeypatch.setenv("NFM_SCRATCH", str(tmp_path / "one"))
    there = as_path(f"{bucket}/run/teacher/0123456789ab")
    atomic.create_json(there / "spec.json", {"stage": "teacher"})
    return there
