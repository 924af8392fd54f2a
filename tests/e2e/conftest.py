"""The `nfm` command in this process, which saves the seconds that every new one takes to import torch; a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline.cli import main
from tests.storage.s3server import bucket, s3, s3_server  # noqa: F401  fixtures

if TYPE_CHECKING:
    from tests.conftest import Lab

Nfm = Callable[..., str]


def command(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nfm:
    """nfm(*arguments, exits=0) runs in the lab's folder and returns what it printed."""
    monkeypatch.setenv("NFM_ARTIFACTS", str(lab.artifacts))
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "passive"))
    monkeypatch.chdir(lab.folder)

    def run(*arguments: object, exits: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["nfm", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        assert code == exits, f"exit {code}, not {exits}:\n{out}\n{err}"
        return out + err

    return run


@pytest.fixture
def nfm(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nfm:
    """The command on a copy of the tiny run."""
    return command(lab, monkeypatch, capsys)


@pytest.fixture
def nfm_anew(empty: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nfm:
    """The command where nothing is made yet."""
    return command(empty, monkeypatch, capsys)
