"""The paper's result on 2-D distributions with exact distances: the teacher's pairing is what saves steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nfm.storage.files import atomic

if TYPE_CHECKING:
    from tests.conftest import Lab
    from tests.e2e.conftest import Nfm

CONFIGS = Path(__file__).parents[3] / "configs"
QUICK = (
    *("--set", "evaluate.nfe=[3]"),
    *("--set", "evaluate.curvature_trajectories=8"),
    *("--set", "evaluate.speed_batches=[64]"),
)


@pytest.mark.parametrize("ground", ["checkerboard", "gaussians"])
def test_a_ground_goes_all_the_way_to_its_exact_distance(empty: Lab, nfm_anew: Nfm, ground: str) -> None:
    """At sizes that teach nobody anything; what the full ones show is told below."""
    small = (
        "teacher.images=640",
        "student.pairs=640",
        "data.points=1200",
        "evaluate.samples=400",
        "data.heldout=0.4",
    )
    sets = (word for setting in small for word in ("--set", setting))
    nfm_anew("run", "evaluate", "-c", CONFIGS / f"{ground}.toml", *QUICK, *sets)
    rows = atomic.read_json(empty.only("evaluate").path / "evaluation.json")["rows"]
    students = {row["coupling"]: row["w2"] for row in rows if row["model"] == "student"}
    (floor,) = (row["w2"] for row in rows if row["model"] == "floor")
    assert sorted(students) == ["independent", "nfm", "nfm:permuted"]
    assert all(math.isfinite(distance) and distance > floor > 0 for distance in students.values()), (floor, students)


@pytest.mark.long
@pytest.mark.parametrize(("ground", "samples"), [("checkerboard", 2000), ("gaussians", 8000)])
def test_with_three_steps_nfm_has_half_of_independents_excess_and_permuted_noise_loses_the_gain(
    empty: Lab, nfm_anew: Nfm, ground: str, samples: int
) -> None:
    nfm_anew("run", "evaluate", "-c", CONFIGS / f"{ground}.toml", *QUICK)
    rows = atomic.read_json(empty.only("evaluate").path / "evaluation.json")["rows"]
    (floor,) = (row["w2"] for row in rows if row["model"] == "floor")
    excess = {row["coupling"]: row["w2"] - floor for row in rows if row["model"] == "student"}
    assert sorted(excess) == ["independent", "nfm", "nfm:permuted"]
    assert {(row["sampler"], row["nfe"], row["samples"]) for row in rows if row["model"] == "student"} == {
        ("euler", 3, samples)
    }
    assert excess["independent"] > 0.25 * floor, (floor, excess)  # there is something to gain
    assert excess["nfm"] <= 0.5 * excess["independent"], (floor, excess)
    assert excess["nfm:permuted"] >= 0.75 * excess["independent"], (floor, excess)
