"""Fixtures of the artifacts: the S3 server."""

from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures
