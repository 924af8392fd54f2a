"""How a command ends if its output cannot be written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from unittest import mock

import pytest

from nfm.pipeline.cli import main


def ended(output: io.TextIOWrapper) -> tuple[int, str]:
    """The exit code and what standard error got of a command whose standard output is this."""
    told = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["nfm", "ls", "--json"]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(told),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    return int(stopped.value.code or 0), told.getvalue()


def test_a_full_standard_output_is_called_that() -> None:
    with open("/dev/full", "w", encoding="utf-8") as output:
        code, told = ended(output)
    assert code == 1
    assert told == "nfm: standard output: No space left on device; what was made stays, send the text elsewhere\n"


def test_a_closed_output_pipe_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w", encoding="utf-8") as output:
        assert ended(output) == (1, "")
