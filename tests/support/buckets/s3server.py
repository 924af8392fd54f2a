"""A real server of an object store's protocol on loopback, behind a proxy that fails on request.

It speaks S3 (moto's, or what NFM_TEST_S3 names). With NFM_TEST_CLOUD=gs or az, or `parametrize("s3", ["gs", "az"],
indirect=True)`, it speaks Google's or Azure's protocol; see emulators.py.

`faults` is a list that a test fills: each fault is used up by the requests that it matches, in order. All else passes.
"""

from __future__ import annotations

import functools
import http.client
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest

from tests.support.buckets import emulators

Kind = Literal[
    "error",  # the answer is this status, nothing is done
    "reset",  # the connection is reset before anything is done
    "lose",  # it is done, and the connection is reset instead of an answer
    "cut",  # half of the body arrives, then the connection ends
    "shrink",  # half of the body arrives, and Content-Length says that this is all
    "flip",  # a byte of the body is another one
    "delay",  # the answer comes after `seconds`
    "if-match",  # a condition of this name is ignored
    "if-none-match",
]
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
NAMED = "NFM_TEST_S3"  # an endpoint, for `make test-s3`
if NAMED in os.environ:
    KEYS |= {name: os.environ[name] for name in KEYS if name in os.environ}
CLOUD = os.environ.get("NFM_TEST_CLOUD", "s3")  # for `make test-gs` and `make test-az`
s3_alone = pytest.mark.skipif(CLOUD != "s3", reason="about S3's protocol")


@dataclass
class Fault:
    """One way of failing, for the next `times` requests of this method whose path contains `where`."""

    kind: Kind
    where: str = ""
    method: str = ""
    times: int = 1
    status: int = 503
    code: str = "ServiceUnavailable"
    seconds: float = 0.0

    def body(self) -> bytes:
        return f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>on request</Message></Error>".encode()


@dataclass
class S3:
    """The server as a test sees it: an address, faults to come, and what was asked so far."""

    endpoint: str
    scheme: str = "s3"
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, kind: Kind, where: str = "", **how: object) -> Fault:
        """Orders a fault."""
        fault = Fault(kind, where, **how)  # type: ignore[arg-type]
        with self.lock:
            self.faults.append(fault)
        return fault

    def environment(self) -> dict[str, str]:
        """What a process needs in order to use the server."""
        if self.scheme != "s3":
            return emulators.environment(self.scheme, self.endpoint)
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}

    def count(self, method: str, where: str = "") -> int:
        """Requests of a method so far whose path contains `where`."""
        with self.lock:
            return sum(asked == method and where in path for asked, path in self.requests)

    def fault_for(self, method: str, path: str, body: bytes) -> Fault | None:
        if self.scheme == "gs":
            method, path = emulators.as_of_s3(method, path, body)
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("", method) and fault.where in path:
                    fault.times -= 1
                    return fault
        return None


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "proxy"
    wbufsize, disable_nagle_algorithm = -1, True  # an answer goes out at once and whole
    s3: S3
    behind: tuple[str, int]

    def log_message(self, *_: object) -> None:
        pass

    def handle_one(self) -> None:
        body = self._read_body()
        fault = self.s3.fault_for(self.command, self.path, body)
        kind = fault.kind if fault else None
        if fault and kind == "error":
            self._answer(fault.status, [("Content-Type", "application/xml")], fault.body())
            return
        if kind == "reset":
            self._reset()
            return
        if fault and kind == "delay":
            time.sleep(fault.seconds)
        behind = http.client.HTTPConnection(*self.behind, timeout=30)
        try:
            dropped = ("transfer-encoding", "expect", "connection", kind)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            headers["Content-Length"] = str(len(body))
            behind.request(self.command, self.path, body, headers)
            answer = behind.getresponse()
            data = answer.read()
            self._give(kind, answer.status, answer.getheaders(), data)
        finally:
            behind.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815  the base class's names

    def _give(self, kind: str | None, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        if kind == "lose":
            self._reset()
        elif kind == "cut":
            self._answer(status, headers, data[: len(data) // 2], length=len(data))
            self._reset()
        elif kind == "shrink":
            self._answer(status, headers, data[: len(data) // 2])
        elif kind == "flip":
            middle = len(data) // 2
            self._answer(status, headers, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        else:
            self._answer(status, headers, data)

    def _read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        own = {"transfer-encoding", "connection"} | ({"content-length"} if self.command != "HEAD" else set())
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def _reset(self) -> None:
        """Ends the connection with a reset, not with an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:  # connections that a fault or a client ended
        pass


@contextmanager
def serving(host: str = "127.0.0.1", scheme: str = "s3") -> Iterator[S3]:
    """Runs the server and its proxy, which listens at `host`."""
    handler = type("Proxy", (_Proxy,), {})
    proxy = _Server((host, 0), handler)
    endpoint = f"http://{host}:{proxy.server_address[1]}"
    with _s3() if scheme == "s3" else emulators.running(scheme, endpoint) as behind:
        handler.behind, handler.s3 = behind, S3(endpoint, scheme)  # type: ignore[attr-defined]
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield handler.s3  # type: ignore[attr-defined]
        finally:
            proxy.shutdown()
            proxy.server_close()


@contextmanager
def _s3() -> Iterator[tuple[str, int]]:
    if named := os.environ.get(NAMED):
        where = urlsplit(named)
        assert where.scheme == "http", f"{NAMED} = {named}: the proxy speaks http alone; write http://HOST:PORT"
        yield str(where.hostname), where.port or 80
        return
    import moto.backends
    from moto.server import ThreadedMotoServer

    # For each request moto lists the folder of its services, which takes more time than to answer it.
    services = tuple(moto.backends.list_of_moto_modules())
    setattr(moto.backends, "list_of_moto_modules", lambda: services)  # noqa: B010  not for type checkers
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Callable[[str], S3]]:
    """The server of a scheme, started once."""
    with ExitStack() as running:

        @functools.cache
        def started(scheme: str) -> S3:
            if scheme != "s3":
                emulators.needed(scheme)
            else:
                if NAMED not in os.environ:
                    pytest.importorskip("moto.server")
                pytest.importorskip("s3fs")
                _read_the_models_of_s3_once()
            return running.enter_context(serving(scheme=scheme))

        yield started


def _read_the_models_of_s3_once() -> None:
    """Every client reads a megabyte of JSON that says what S3 is. They are not changed by anybody."""
    import botocore.session

    if not hasattr(botocore.session.create_loader, "cache_info"):
        setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))  # noqa: B010


@pytest.fixture
def s3(
    s3_server: Callable[[str], S3], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[S3]:
    """The server without faults, known to this process by its environment; an empty cache; little patience."""
    server = s3_server(getattr(request, "param", CLOUD))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "NFM_CACHE_BYTES", *emulators.NAMES):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NFM_PATIENCE", "10")
    monkeypatch.setattr("nfm.storage.files.copies.cache._default", None)
    _forget_clients_of_another(server.endpoint)
    server.faults.clear()
    server.requests.clear()
    yield server
    server.faults.clear()


_known: list[str] = []  # the endpoint of the clients that there are


def _forget_clients_of_another(endpoint: str) -> None:
    """Every folder of tests that asks for a server has its own."""
    if _known != [endpoint]:
        new_clients()
        _known[:] = [endpoint]


def new_clients() -> None:
    """Makes the next request read the environment again, for tests that change it; call it before and after."""
    for module, client in (("s3fs", "S3FileSystem"), ("gcsfs", "GCSFileSystem"), ("adlfs", "AzureBlobFileSystem")):
        if module in sys.modules:
            getattr(sys.modules[module], client).clear_instance_cache()


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    """The URL of a bucket of this test's own."""
    import fsspec

    name = f"b{abs(hash(request.node.nodeid)):x}"
    fsspec.filesystem(s3.scheme, use_listings_cache=False).mkdir(name)
    return f"{s3.scheme}://{name}"
