"""The stage graph: who reads whom, where outputs live, and the nodes of baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError, artifacts_root, find
from nfm.pipeline.builder import build
from nfm.pipeline.config import ConfigError, load
from nfm.pipeline.graph import Node, upstream

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
    assert set(nodes["evaluate"].inputs) == {"data", "features", "student", "student:independent", "teacher"}
    assert set(nodes["report"].inputs) == {*nodes["evaluate"].inputs, "pairs", "pairs:independent", "evaluate"}


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


def test_semidiscrete_pairs_read_a_potential_of_the_data_alone(here: Lab) -> None:
    assert names(here, "pairs", "pairs.coupling=semidiscrete-ot") == ["data", "potential", "pairs"]
    nodes = build(load(here.config, ["evaluate.baselines=['semidiscrete-ot', 'minibatch-ot']"]))
    assert nodes["pairs:semidiscrete-ot"].inputs["potential"] is nodes["potential"]
    assert set(nodes["pairs:minibatch-ot"].inputs) == {"data"}
    assert "potential" not in build(load(here.config))
    assert [node.name for node in upstream(build(load(here.config), target="potential"), "potential")] == [
        "data",
        "potential",
    ]


def test_reflow_pairs_read_the_student_of_another_coupling_or_the_one_that_is_given(here: Lab) -> None:
    chain = ["data", "pairs:independent", "student:independent", "pairs", "student"]
    assert names(here, "student", "pairs.coupling=reflow") == chain
    nodes = build(load(here.config, ["evaluate.baselines=['reflow']", "pairs.reflow_of=nfm"]))
    assert nodes["pairs:reflow"].inputs["student"] is nodes["student"]
    student = here.only("student")
    given = build(load(here.config, ["pairs.coupling=reflow", f"pairs.student={student.path}"]))
    assert set(given["pairs"].inputs) == {"data"}
    assert given["pairs"].given == {"student": student}
    with pytest.raises(ArtifactError, match="no finished student"):
        build(load(here.config, ["pairs.coupling=reflow", f"pairs.student={here.only('teacher').path}"]))
    with pytest.raises(ConfigError, match=r"pairs.reflow_of: its student would need itself"):
        build(load(here.config, ["pairs.coupling=reflow", "pairs.reflow_of=reflow"]))


def test_a_variant_shares_the_store_of_its_coupling_and_differs_in_the_readers_knobs_alone(here: Lab) -> None:
    nodes = build(load(here.config, ["evaluate.baselines=['nfm:soften=0.5', 'nfm', 'nfm:independent=0.25']"]))
    softened, mixed, main = nodes["student:nfm:soften=0.5"], nodes["student:nfm:independent=0.25"], nodes["student"]
    assert softened.inputs["pairs"] is mixed.inputs["pairs"] is nodes["pairs"]
    assert mixed.inputs["pairs:independent"] is nodes["pairs:independent"]
    assert softened.config == main.config.model_copy(update={"soften": 0.5})
    assert mixed.config == main.config.model_copy(update={"mixture": {"independent": 0.25}})
    assert "student:nfm" not in nodes, "it is the run's own student"
    assert softened.artifact() != main.artifact()


def test_options_of_one_coupling_leave_the_others_where_they_are(here: Lab) -> None:
    plain, moved = (
        build(load(here.config, ["evaluate.baselines=['independent', 'minibatch-ot']", *more]))
        for more in ([], ["pairs.group_size=64", "potential.samples=7"])
    )
    for name in ("pairs", "pairs:independent", "student", "student:independent"):
        assert plain[name].artifact() == moved[name].artifact()
    assert plain["pairs:minibatch-ot"].artifact() != moved["pairs:minibatch-ot"].artifact()


def test_the_code_of_a_custom_coupling_is_part_of_its_identity(
    here: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "own_coupling.py"
    places = []
    for text in ("a = 1\n", "a = 2\n"):
        code.write_text(f"{text}\ndef pair(images, labels, rng):\n    return rng.standard_normal(images.shape)\n")
        node = build(load(here.config, ["pairs.coupling=custom", "pairs.custom=own_coupling:pair"]))["pairs"]
        places.append(node.artifact())
        assert set(node.external()) == {"custom"}
    assert places[0] != places[1]


def test_points_of_the_plane_are_measured_without_features(here: Lab) -> None:
    nodes = build(load(here.config, ["evaluate.features=none", "data.average=4"]))
    assert "features" not in nodes
    assert set(nodes["evaluate"].inputs) == {"data", "student", "student:independent", "teacher"}
    with pytest.raises(ConfigError, match="this run has no stage features"):
        upstream(nodes, "features")


def compared(lab: Lab, couplings: str, *overrides: str) -> dict[str, Node]:
    return build(load(lab.config, [f"compare.couplings={couplings}", *overrides]))


def test_a_comparison_has_a_student_and_an_evaluation_a_variant_and_seed(here: Lab) -> None:
    nodes = compared(here, "['nfm', 'independent@3', 'nfm:soften=0.5']", "compare.seeds=[0, 1]")
    students = ["nfm@0", "nfm@1", "independent@3", "nfm:soften=0.5@0", "nfm:soften=0.5@1"]
    assert set(nodes["compare"].inputs) == {
        "evaluate:teacher",
        "pairs:nfm",
        "pairs:independent",
        *(f"{stage}:{student}" for stage in ("student", "evaluate") for student in students),
    }
    assert nodes["student:nfm@1"].config == nodes["student"].config.model_copy(update={"seed": 1})
    assert nodes["student:nfm@0"].artifact() == nodes["student"].artifact()
    assert set(nodes["evaluate:nfm@1"].inputs) == {"data", "features", "student"}
    assert set(nodes["evaluate:teacher"].inputs) == {"data", "features", "teacher"}


def test_a_comparison_without_the_teachers_pairs_needs_no_teacher(here: Lab) -> None:
    nodes = compared(here, "['independent', 'minibatch-ot']")
    assert "evaluate:teacher" not in nodes["compare"].inputs
    assert "teacher" not in [node.name for node in upstream(nodes, "compare")]


def test_a_store_that_comes_from_the_teacher_by_a_student_has_the_teacher_beside_it(here: Lab) -> None:
    reflow = ["pairs.coupling=reflow", "pairs.reflow_of=nfm"]
    nodes = compared(here, "['reflow', 'independent']", *reflow)
    assert set(nodes["evaluate:teacher"].inputs) == {"data", "features", "teacher"}
    assert "evaluate:teacher" in nodes["compare"].inputs
    assert "teacher" in nodes["evaluate"].inputs
    assert "evaluate:teacher" not in compared(here, "['independent']", *reflow)["compare"].inputs


def test_every_store_of_a_comparison_is_made_before_its_students(here: Lab) -> None:
    made = [node.name for node in upstream(compared(here, "['nfm', 'minibatch-ot']"), "compare")]
    assert made.index("pairs:minibatch-ot") < made.index("student:nfm@0")
    made = [node.name for node in upstream(compared(here, "['reflow', 'minibatch-ot']"), "compare")]
    generator = next(name for name in made if name.startswith("student"))
    assert made.index("pairs:minibatch-ot") < made.index(generator) < made.index("pairs:reflow")


def test_options_of_the_teacher_leave_the_students_evaluations_where_they_are(here: Lab) -> None:
    def places(*overrides: str) -> tuple[Artifact | None, Artifact | None]:
        nodes = compared(here, "['nfm']", *overrides)
        return nodes["evaluate:teacher"].artifact(), nodes["evaluate:nfm@0"].artifact()

    teacher, student = places()
    assert None not in (teacher, student)
    assert places("evaluate.baselines=[]") == (teacher, student)
    assert places("evaluate.guidance=1.5")[1] == student
    assert places("evaluate.guidance=1.5")[0] != teacher
    assert places("evaluate.nfe=[3]")[0] == teacher


def test_an_impossible_variant_is_an_error_of_its_config_field(here: Lab) -> None:
    with pytest.raises(ConfigError, match=r"student: nfm:nfm=0.5: nfm is mixed with itself"):
        build(load(here.config, ["student.mixture={nfm = 0.5}"]))
