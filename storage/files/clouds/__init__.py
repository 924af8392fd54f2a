"""What differs between object stores: how to write on a condition, what a listing says, how long a client waits.

All else is the same calls of fsspec's file systems for all of them. The conditional writes go through the clients of
these file systems too, so that one set of credentials and one endpoint serve both.
"""

from __future__ import annotations

from typing import Any

from nfm.storage.files.clouds import az, gs, s3
from nfm.storage.files.clouds.cloud import Cloud

# Not abfs://container@account.../x: as a text it is abfs://container/x, which names no account.
CLOUDS: dict[str, Cloud] = {"s3": s3, "s3a": s3, "gs": gs, "gcs": gs, "az": az}
SHOWN = {*s3.ENDPOINTS, *gs.ENDPOINTS}  # of the variables with an endpoint, those that are an address alone
PLACES = "s3://bucket/..., gs://bucket/..., az://container/..."  # for messages


def of(where: Any) -> Cloud | None:
    """The cloud of a path of `as_path`, or of a file system; None for any other place."""
    named = getattr(where, "protocol", "")
    names = (named,) if isinstance(named, str) else named
    return next((CLOUDS[name] for name in names if name in CLOUDS), None)


def copy(fs: Any, source: str, target: str) -> None:
    """Copies an object within a store, and returns when all of it is there."""
    cloud = of(fs)
    if cloud is None:
        fs.cp_file(source, target)
    else:
        cloud.copy(fs, source, target)
