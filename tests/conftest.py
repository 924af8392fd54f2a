"""A tiny run of the whole pipeline, made once for all processes of the tests, and copies of it for tests that write."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two processes that spin on the same cores cost each other five times their speed.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from nfm.stages.pairs import coupling_report
from nfm.stages.trained.devices import timing
from tests.support.lab import CONFIG, Lab
from tests.support.once import ByFile, once
from tests.support.sizes import FULL

LONGEST_SECONDS = 10.0
FAR_TOO_LONG = 6  # times what a test may take


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """On several processes a file stays on one, in the order of the files: those that start processes come first."""
    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A long test that does not say so by a marker is told; in CI one that is far too long fails.

    A clock is no judge of a busy machine: between the two limits lies a factor that no neighbour has cost yet.
    """
    report = yield
    marker = item.get_closest_marker("seconds")
    limit = marker.args[0] if marker else LONGEST_SECONDS
    if FULL or call.when != "call" or not report.passed or call.duration <= limit:
        return report
    sentence = (
        f"{item.nodeid} took {call.duration:.1f} s, more than {limit:.0f} s: make it smaller "
        "(tests/support/sizes.py), mark it `long`, which leaves it to `make test-all`, or state its `seconds`"
    )
    if "CI" in os.environ and call.duration > FAR_TOO_LONG * limit:
        report.outcome, report.longrepr = "failed", sentence
    else:
        item.warn(pytest.PytestWarning(sentence))
    return report


def pytest_collection_finish() -> None:
    """What is imported stays: to look through it for garbage takes half a second, and each plan does so some times."""
    gc.collect()
    gc.freeze()


pytest.register_assert_rewrite("tests.stages.pairs.shop")  # whose own assertions are to show values, as a test's do
settings.register_profile("nfm", deadline=None)  # a busy machine is no finding
settings.load_profile("nfm")


@pytest.fixture(scope="session", autouse=True)
def _measured_for_a_moment() -> Iterator[None]:
    """Plans time this machine, and sealing measures its pairs, as briefly as they can: few tests look at how well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SECONDS", 0.1)
        patch.setattr(timing, "STEP_SECONDS", 0.1)
        patch.setattr(coupling_report, "AUC_PAIRS", 256)
        # Nobody pulls the plug, and a disk takes 4 ms for each. Programs that tests start have the real one.
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _on_one_process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests of a file share is made once: no other process of this run has the same file."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        here = tmp_path_factory.getbasetemp().parent / "files" / request.node.nodeid.replace("/", "-")
        here.mkdir(parents=True, exist_ok=True)
        (here / worker).touch()
        assert os.listdir(here) == [worker], "several processes have tests of this file, see support/once.py"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The tiny run, complete up to its report. Tests only read it; what writes takes `lab`."""

    def make(folder: Path) -> None:
        lab = Lab(folder)
        lab.config.write_text(CONFIG)
        lab.run("report")

    # Looking leaves receipts beside the artifacts, so each process looks at its own copy.
    lab = Lab(tmp_path_factory.mktemp("made") / "lab")
    shutil.copytree(once(tmp_path_factory, "tiny-run", make), lab.folder)
    yield lab
    lab.close()


@pytest.fixture
def lab(made: Lab, tmp_path: Path) -> Iterator[Lab]:
    """A copy of the tiny run that a test may change."""
    copy = Lab(tmp_path / "lab")
    shutil.copytree(made.folder, copy.folder)
    yield copy
    copy.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Lab]:
    """The same config with nothing made yet."""
    lab = Lab(tmp_path / "empty")
    lab.folder.mkdir()
    lab.config.write_text(CONFIG)
    yield lab
    lab.close()


@pytest.fixture
def root(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts of `lab`, for tests that call the pipeline's functions in this process."""
    monkeypatch.setenv("NFM_ARTIFACTS", str(lab.artifacts))
    return lab.artifacts
