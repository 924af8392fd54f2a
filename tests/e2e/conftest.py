"""The `nfm` command as a function of its arguments; an S3 server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.support.buckets.s3server import bucket, s3, s3_server  # noqa: F401  fixtures

if TYPE_CHECKING:
    from tests.conftest import Lab

Nfm = Callable[..., str]


def command(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Nfm:
    """nfm(*arguments, exits=0) runs in the lab's folder and returns what it printed; the test moves there too."""
    monkeypatch.setenv("NFM_ARTIFACTS", str(lab.artifacts))
    monkeypatch.chdir(lab.folder)

    def run(*arguments: object, exits: int = 0) -> str:
        done = lab.nfm(*arguments, exits=exits)
        return done.stdout + done.stderr

    return run


@pytest.fixture
def nfm(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Nfm:
    """The command on a copy of the tiny run."""
    return command(lab, monkeypatch)


@pytest.fixture
def nfm_anew(empty: Lab, monkeypatch: pytest.MonkeyPatch) -> Nfm:
    """The command where nothing is made yet."""
    return command(empty, monkeypatch)
