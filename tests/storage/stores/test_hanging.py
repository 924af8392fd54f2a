"""A server that takes connections and never answers costs a reader its patience, not minutes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nfm.storage import PairStore, StorageError
from nfm.storage.files.paths import as_path
from nfm.storage.files.remote import read_range
from tests.support.buckets.s3server import new_clients

BUSY = 20.0  # seconds that a slow machine may take beside


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The connections to a server of S3's address that takes every one, reads nothing and says nothing."""
    pytest.importorskip("s3fs")
    taken: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:  # the test is over
                    return

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NFM_PATIENCE": "10",
        }.items():
            monkeypatch.setenv(name, value)
        new_clients()
        yield taken
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in taken:
            connection.close()
    new_clients()


@pytest.mark.long
@pytest.mark.parametrize(
    ("ask", "most"),
    [
        (lambda: PairStore.open("s3://bucket/store"), 10),
        (lambda: read_range(as_path("s3://bucket/store/shards/x.tar"), 0, 10), 20),
    ],
    ids=["opening", "reading"],
)
def test_patience_ends_where_nobody_answers(hanging: list[Any], ask: Callable[[], Any], most: float) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer within 10 s \(NFM_PATIENCE\): check the network"):
        ask()
    assert time.monotonic() - began < most + BUSY
    assert hanging, "nobody asked the server"
