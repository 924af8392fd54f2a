"""The options of compare also work for the commands that plan, run or show a comparison."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Lab

GIVEN = ("-c", "tiny.toml", "--couplings", "independent,nfm@0", "--seeds", "0,3")


@pytest.mark.parametrize("words", [("plan", "compare"), ("status",)])
def test_plan_and_status_show_the_comparison_that_the_options_name(empty: Lab, words: tuple[str, ...]) -> None:
    rows = json.loads(empty.nfm(*words, *GIVEN, "--json").stdout)
    stages = {row["stage"] for row in rows}
    assert {"compare", "student:independent@0", "student:independent@3", "student:nfm@0"} <= stages
    assert "student:nfm@3" not in stages


def test_run_takes_them_as_compare_does(empty: Lab) -> None:
    for words in (("run", "compare"), ("compare",)):
        told = empty.nfm(*words, *GIVEN, "--set", "student.patch=5", exits=2).stderr
        assert "patch = 5" in told


@pytest.mark.parametrize("words", [("plan", "pairs"), ("run", "data")])
def test_other_stages_refuse_them(empty: Lab, words: tuple[str, ...]) -> None:
    assert f"of the stage compare, not of {words[1]}" in empty.nfm(*words, *GIVEN, exits=2).stderr


@pytest.mark.parametrize("seeds", ["", "x", "-1", "0,", "1.5", "0,0", "9" * 30, "0];x=[1"])
def test_invalid_seeds_are_refused(empty: Lab, seeds: str) -> None:
    told = empty.nfm("status", "-c", "tiny.toml", "--couplings", "nfm", "--seeds", seeds, exits=2).stderr
    assert "seeds" in told


def test_seeds_that_no_coupling_takes_are_refused(empty: Lab) -> None:
    told = empty.nfm("status", "-c", "tiny.toml", "--couplings", "nfm@0,independent@1", "--seeds", "5", exits=2).stderr
    assert "--seeds: every coupling names its own seeds, after @; leave it out" in told


def test_unknown_couplings_are_refused(empty: Lab) -> None:
    for couplings in ("", ",", "nfm,reflux", "nfm:soften=x", 'nfm"]'):
        assert "couplings" in empty.nfm("status", "-c", "tiny.toml", "--couplings", couplings, exits=2).stderr
