"""The config section [evaluate]: what it refuses, and what decides an evaluation's identity."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.evaluation.table import COLUMNS, distance_key


def test_the_config_says_which_evaluations_a_solver_can_spend() -> None:
    assert EvaluateConfig(nfe=[8, 4], solver="rk4").nfe == (8, 4)
    for options, said in (
        ({"nfe": [8]}, "heun takes 2N - 1 evaluations, an odd number; use 7 or 9"),
        ({"nfe": [6], "solver": "rk4"}, "use 4 or 8"),
        ({"solver": "midpoint"}, "use 30 or 32"),
        ({"nfe": [1_000_001]}, "nfe = 1000001: at most 100000 evaluations"),
        ({"nfe": []}, "at least 1 item"),
        ({"nfe": [7, 5, 7]}, "7 is named more than once"),
        ({"nfe": [8], "solver": "sde-heun"}, "use 7 or 9"),
        ({"diffusion": "constant"}, "'constant' is of solvers that add noise, sde-euler and sde-heun"),
        ({"diffusion": "cubic", "solver": "sde-euler"}, "'sigma', 'constant', 'sin.2' or 'decreasing'"),
        ({"baselines": ["nearest"]}, "coupling 'nearest' is unknown"),
    ):
        with pytest.raises(ValidationError, match=said):
            EvaluateConfig(**options)
    assert EvaluateConfig(baselines=["nfm:soften=0.50"]).baselines == ("nfm:soften=0.5",)


def test_options_at_their_defaults_are_no_part_of_the_identity() -> None:
    assert (
        not {"features", "solver", "grid", "reference", "student_guidance", "inception_weights", "ema", "diffusion"}
        & EvaluateConfig().semantic().keys()
    )
    assert EvaluateConfig(features="none").semantic()["features"] == "none"


def test_the_distance_has_one_name_in_config_row_and_columns() -> None:
    for features, key in (("cnn", "fd_cnn"), ("inception", "fid"), ("none", "w2")):
        assert distance_key(EvaluateConfig(features=features)) == key == distance_key({"name": "x", key: 1.0})
        assert key in {column.key for column in COLUMNS}
    with pytest.raises(ValueError, match="'x' holds no distance"):
        distance_key({"name": "x"})


def test_an_interval_of_guidance_without_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it says when students are guided, and evaluate\.student_guidance is 0"):
        EvaluateConfig(guidance_interval=(0.2, 0.8))
    assert EvaluateConfig(guidance_interval=(0.2, 0.8), student_guidance=1.0).guidance_interval == (0.2, 0.8)
    assert EvaluateConfig(guidance_interval=(0.0, 1.0)).student_guidance == 0
