"""How a command ends if its output cannot be written, and how it says warnings."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from unittest import mock

import click
import pytest

from nfm.pipeline.cli import main
from nfm.pipeline.cli.exits import run
from nfm.storage.errors import Unusual


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


def test_a_warning_of_ours_is_one_line_and_others_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def warns() -> None:
        warnings.warn("field 'a': no row has a value; see https://me:secret@host/x", Unusual, stacklevel=1)
        warnings.warn("of somebody else", UserWarning, stacklevel=1)

    with warnings.catch_warnings(), mock.patch.object(sys, "argv", ["nfm"]):
        warnings.simplefilter("always")
        warnings.showwarning = before = lambda message, *where: print(f"as before: {message}", file=sys.stderr)
        with contextlib.suppress(SystemExit):
            run(warns)
        assert warnings.showwarning is before
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("nfm: field 'a': no row has a value; see https://")
    assert "secret" not in told[0]
    assert told[1:] == ["as before: of somebody else"]
