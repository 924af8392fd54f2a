"""Clusters of several nodes that tests start, change and end."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures


@dataclass
class Nodes:
    """A cluster and, in `environment`, what a driver needs to reach it."""

    process: subprocess.Popen[str]
    jobs: str
    environment: dict[str, str]

    def add(self, name: str, cpus: int = 1, folder: Path | str = "") -> None:
        """Add a node; its processes work in `folder`, if one is given, and keep their scratch there."""
        self._tell(f"add {name} {cpus} {folder}")

    def remove(self, name: str) -> None:
        """Kill every process of a node, as a preempted machine would."""
        self._tell(f"remove {name}")

    def _tell(self, line: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def start_nodes(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    """Start a cluster with a head of so many CPUs; it has its own folder and its own token."""
    started: list[subprocess.Popen[str]] = []
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp:  # sockets want short paths

        def start(cpus: int, *flags: str) -> Nodes:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("nodes.py")), str(cpus), temp, *flags],
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            started.append(process)
            assert process.stdout
            told = next(line for line in process.stdout if line.startswith("{"))
            found = json.loads(told)
            return Nodes(process, found["jobs"], {**own, "RAY_ADDRESS": found["address"]})

        yield start
        for process in started:
            process.communicate()  # closes its stdin, which ends it
