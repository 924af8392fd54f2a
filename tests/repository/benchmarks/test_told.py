"""What a benchmark says of itself."""

from __future__ import annotations

import sys

import pytest

from benchmarks.told import command


@pytest.mark.parametrize("given", [["--work", "/tmp/mine"], ["--work=/tmp/mine"]])
def test_a_command_names_no_folder_of_the_machine_that_ran_it(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--seeds", "0", *given, "-o", "/tmp/out", "--output=/tmp/out"])
    told = command("benchmarks.rebalanced")
    assert told.replace("=", " ") == "python -m benchmarks.rebalanced --seeds 0 --work SCRATCH"
