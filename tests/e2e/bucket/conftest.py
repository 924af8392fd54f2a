"""A run in a bucket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.buckets.in_bucket import Bucket

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.support.buckets.s3server import S3


@pytest.fixture
def there(made: Lab, s3: S3, bucket: str, tmp_path: Path) -> Bucket:
    """The run in a bucket where nothing is made yet."""
    return Bucket(f"{bucket}/run", s3, made.config, tmp_path / "machines")
