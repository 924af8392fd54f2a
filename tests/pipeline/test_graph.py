"""The stage graph: who reads whom, where outputs live, and the nodes of baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline.artifact import ArtifactError, artifacts_root, find
from nfm.pipeline.config import load
from nfm.pipeline.graph import build, upstream

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture
def here(made: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("NFM_ARTIFACTS", str(made.artifacts))
    return made


def names(lab: Lab, target: str, *overrides: str) -> list[str]:
    return [node.name for node in upstream(build(load(lab.config, overrides)), target)]


def test_a_target_needs_its_inputs_first_and_nothing_else(here: Lab) -> None:
    assert names(here, "data") == ["data"]
    assert names(here, "teacher") == ["data", "teacher"]
    assert names(here, "pairs") == ["data", "teacher", "pairs"]
    assert names(here, "student") == ["data", "teacher", "pairs", "student"]
    assert names(here, "features") == ["data", "features"]


def test_a_baseline_has_pairs_and_student_of_its_own_that_differ_in_the_coupling_alone(here: Lab) -> None:
    nodes = build(load(here.config))
    assert nodes["pairs:independent"].config == nodes["pairs"].config.model_copy(update={"coupling": "independent"})
    assert nodes["student:independent"].config == nodes["student"].config
    assert set(nodes["pairs:independent"].inputs) == {"data"}
    assert nodes["student:independent"].inputs["pairs"] is nodes["pairs:independent"]
    assert {"pairs:independent", "student:independent", "student", "features", "teacher"} <= set(
        nodes["evaluate"].inputs
    )
    assert set(nodes["report"].inputs) == {*nodes["evaluate"].inputs, "evaluate"}


def test_an_independent_run_has_no_teacher_and_no_baseline_of_itself(here: Lab) -> None:
    overrides = ["pairs.coupling=independent"]
    assert names(here, "report", *overrides) == ["data", "features", "pairs", "student", "evaluate", "report"]
    baseline, main = build(load(here.config))["pairs:independent"], build(load(here.config, overrides))["pairs"]
    assert baseline.artifact() == main.artifact()  # the same store, whether main or baseline


def test_a_node_knows_its_place_only_when_its_inputs_are_done(lab: Lab, root: Path) -> None:
    nodes = build(load(lab.config))
    store = nodes["pairs"].artifact()
    assert store is not None
    assert store.path == artifacts_root() / "pairs" / store.path.name == lab.only("pairs").path
    (lab.only("teacher").path / "manifest.json").unlink()
    fresh = build(load(lab.config))
    assert fresh["teacher"].artifact() is not None
    assert fresh["pairs"].artifact() is None
    assert fresh["student"].artifact() is None
    assert fresh["pairs:independent"].artifact() is not None


def test_the_place_follows_the_content_of_the_inputs_not_their_config(here: Lab) -> None:
    def place(*overrides: str) -> Path:
        artifact = build(load(here.config, overrides))["teacher"].artifact()
        assert artifact is not None
        return artifact.path

    assert place("data.threads=3", "data.licence=mine") == place()
    assert place("teacher.seed=3") != place()


def test_a_student_alone_reads_the_store_it_is_given(here: Lab) -> None:
    store = here.only("pairs")
    nodes = build(load(here.config), store=find(store.path))
    assert list(nodes) == ["student"]
    assert nodes["student"].artifact() == build(load(here.config))["student"].artifact()
    with pytest.raises(ArtifactError, match="is no pair store"):
        build(load(here.config), store=here.only("teacher"))


def test_pairs_live_at_the_newest_generation_with_the_draws_asked_for(here: Lab) -> None:
    def manifest(draws: int) -> tuple[str, bool]:
        artifact = build(load(here.config, [f"pairs.draws={draws}"]))["pairs"].artifact()
        assert artifact is not None
        assert artifact.path == here.only("pairs").path
        return artifact.manifest_name, artifact.done

    assert manifest(2) == ("manifest.g0001.json", True)
    assert manifest(3) == ("manifest.g0002.json", False)
