"""The first sentences of the report say what the figures show, also where they show no gain."""

from __future__ import annotations

from typing import Any

import pytest

from nfm.stages.report.headline import sentences

Distances = dict[int, float]
PLAIN: Distances = {15: 0.26, 7: 0.20, 5: 0.42, 3: 0.88}


def body(students: dict[str, Distances], curvature: dict[str, float] | None = None, **floor: Any) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [{"name": "floor", "model": "floor", "fd_cnn": 0.07, **floor}]
    rows.append({"name": "teacher", "model": "teacher", "sampler": "inverse", "guidance": 0.0, "fd_cnn": 0.3})
    for coupling, distances in students.items():
        for nfe, distance in distances.items():
            how = "heun" if nfe > 5 else "euler"
            rows.append({"model": "student", "coupling": coupling, "sampler": how, "nfe": nfe, "fd_cnn": distance})
    curves = [{"coupling": name, "value": value} for name, value in (curvature or {}).items()]
    return {"rows": rows, "curvature": curves}


def test_the_first_sentence_says_where_the_student_is_ahead_and_how_straight_it_is() -> None:
    nfm = {15: 0.17, 7: 0.09, 5: 0.10, 3: 0.14}
    verdict, figures = sentences(
        body({"nfm": nfm, "independent": PLAIN}, {"nfm": 0.0125, "independent": 0.05}, spread=0.01)
    )
    assert verdict == (
        "The student on nfm pairs is ahead of independent noise at 15, 7, 5 and 3 evaluations; its paths are "
        "straighter, 4 times (curvature 0.013 against 0.05)."
    )
    # Independent noise is 2.1 times its own best at 5 evaluations, and 1.3 times at 15: few evaluations matter from 5.
    assert figures == (
        "FD-CNN at 5 evaluations (Euler), lower is better: nfm 0.1; independent 0.42; teacher, inverse 0.3; "
        "real images, the floor, 0.07 ± 0.01."
    )


@pytest.mark.parametrize(
    ("nfm", "says"),
    [
        ({7: 0.25, 5: 0.4, 3: 0.5}, "is ahead of independent noise at 3 evaluations, level with it at 5 evaluations, "
         "behind it at 7 evaluations"),
        ({7: 0.21, 5: 0.6, 3: 0.9}, "is not ahead of independent noise: level with it at 7 and 3 evaluations, "
         "behind it at 5 evaluations"),
        ({5: 0.6}, "is not ahead of independent noise: behind it at 5 evaluations"),
        ({5: 0.46, 3: 0.80}, "is not ahead of independent noise: level with it at 5 and 3 evaluations;"),
    ],
)  # fmt: skip
def test_a_page_that_shows_no_gain_says_so_first(nfm: Distances, says: str) -> None:
    verdict, _ = sentences(body({"nfm": nfm, "independent": PLAIN}, {"nfm": 0.06, "independent": 0.05}, spread=0.03))
    assert says in verdict
    assert verdict.endswith("; its paths are not straighter (curvature 0.06 against 0.05).")


def test_a_student_that_nothing_is_compared_with_has_its_figures_alone() -> None:
    for students in ({"nfm": {7: 0.1, 5: 0.2}}, {"independent": {7: 0.1, 5: 0.2}}, {"nfm:permuted": {5: 0.2}}):
        (figures,) = sentences(body(students))  # type: ignore[arg-type]
        assert figures.startswith("FD-CNN at 5 evaluations (Euler), ")
        assert "real images, the floor, 0.07." in figures
    assert sentences(body({})) == []


def test_one_evaluation_is_one() -> None:
    verdict, figures = sentences(body({"nfm": {1: 0.5}, "independent": {1: 0.9}}))
    assert verdict.startswith("The student on nfm pairs is ahead of independent noise at 1 evaluation.")
    assert figures.startswith("FD-CNN at 1 evaluation (Euler)")


def test_where_no_number_of_evaluations_is_hard_the_fewest_are_shown() -> None:
    even = {7: 0.2, 3: 0.21}
    _, figures = sentences(body({"nfm": {7: 0.1, 3: 0.1}, "independent": even}))
    assert figures.startswith("FD-CNN at 3 evaluations")


def test_more_evaluations_than_independent_noise_needs_are_never_where_steps_matter() -> None:
    unlearnt = {15: 0.222, 7: 0.102, 5: 0.215, 3: 0.435}  # at 15 the student's own error is what is seen
    _, figures = sentences(body({"nfm": {15: 0.223, 7: 0.19, 5: 0.167, 3: 0.185}, "independent": unlearnt}))
    assert figures.startswith("FD-CNN at 5 evaluations (Euler), lower is better: nfm 0.167; independent 0.215")
