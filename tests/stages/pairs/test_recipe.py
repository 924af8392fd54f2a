"""What a store records about how it was made: fingerprints, makers, old and hostile recipes, and the cost of pairs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nfm.stages.base import Unfit
from nfm.stages.pairs import estimate, stage
from nfm.stages.pairs import recipe as pairs_recipe
from nfm.stages.trained import costs, student
from nfm.stages.trained.teacher import TeacherConfig
from nfm.storage.errors import Misused, StorageError
from nfm.storage.files import atomic
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec, read_spec, write_spec
from nfm.storage.ledger.row_fields import write_row_field
from tests.stages.pairs.shop import SHAPE

PLAIN = StoreSpec(rows=10, rows_per_shard=5, fields=pair_fields(SHAPE), coupling="independent", source="ab" * 32)


def test_a_field_of_source_rows_is_refused_where_images_are_generated(tmp_path: Path) -> None:
    spec = dataclasses.replace(PLAIN, coupling="reflow", student="cd" * 32)
    write_spec(tmp_path, spec)
    with pytest.raises(Misused, match="field 'caption': the images of coupling 'reflow' are generated"):
        write_row_field(tmp_path, "caption", [np.zeros((10, 2))], (2,), "float64")


def test_options_of_other_couplings_leave_a_fingerprint_alone() -> None:
    config = stage.PairsConfig(group_size=64, custom="a:b", reflow_nfe=7, reflow_guidance=1.0, reflow_of="nfm")
    assert stage.for_coupling(config, "nfm").semantic() == stage.PairsConfig().semantic()
    dealt = stage.for_coupling(config, "minibatch-ot")
    assert dealt.semantic() == {**stage.PairsConfig().semantic(), "coupling": "minibatch-ot", "group_size": 64}
    assert stage.for_coupling(config, "reflow").reflow_nfe == 7
    assert stage.for_coupling(config, "custom").custom == "a:b"


def test_each_coupling_says_what_it_is_made_from() -> None:
    roles = {
        name: stage.input_roles(stage.for_coupling(stage.PairsConfig(), name))
        for name in ("nfm", "independent", "minibatch-ot", "custom", "semidiscrete-ot", "reflow")
    }
    plain = ("data",)
    assert roles == {
        "nfm": ("data", "teacher"), "independent": plain, "minibatch-ot": plain, "custom": plain,
        "semidiscrete-ot": ("data", "potential"), "reflow": ("data", "student"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([1], "must be an object with keys"),
        ({"a": [1]}, "coupling_options: a = a list of 1, it must be a finite number"),
        ({"a": float("nan")}, "must be a finite number"),
        ({"a": "x" * 2000}, "at most 1000 characters"),
        ({str(number): 1 for number in range(65)}, "65 of them, 64 at most"),
    ],
)
def test_a_hostile_recipe_is_refused(options: Any, said: str) -> None:
    recipe = {**PLAIN.to_dict(), "coupling_options": options}
    with pytest.raises(StorageError, match=said):
        StoreSpec.from_dict(recipe)


def test_a_recipe_says_what_its_pairs_were_made_with_and_nothing_else() -> None:
    assert set(PLAIN.to_dict()) == {
        "rows", "rows_per_shard", "fields", "coupling", "source", "rows_per_block", "codec", "value_range", "flips",
        "seed", "eta", "sigma_f", "teacher", "classes", "layout", "format",
    }  # fmt: skip
    more: dict[str, Any] = {
        "potential": "ab" * 32,
        "student": "cd" * 32,
        "coupling_options": {"nfe": 7, "grid": "square", "g": 0.5},
    }
    spec = dataclasses.replace(PLAIN, **more)
    assert spec.to_dict() == PLAIN.to_dict() | more
    assert StoreSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


FACTS: dict[str, Any] = {
    "images": 6000, "image_shape": [1, 8, 8], "classes": 10, "student": student.StudentConfig(patch=4, width=64),
    "teacher": TeacherConfig(patch=4, channels=64),
}  # fmt: skip


def test_the_arithmetic_of_pairs_is_told_of_each_coupling() -> None:
    def flops(coupling: str, **options: Any) -> float:
        return pairs_recipe.pair_flops(stage.PairsConfig(coupling=coupling, **options), FACTS)

    assert flops("independent") == flops("custom", custom="a:b") == 0
    assert flops("nfm") == costs.teacher_flops([1, 8, 8], FACTS["teacher"])
    assert flops("minibatch-ot", group_size=100) == 2 * 64 * 100
    assert flops("minibatch-ot", group_size=1000) == 2 * 64 * 409, "4,096 records a shard, of 10 classes"
    assert flops("semidiscrete-ot") == 2 * 64 * 600
    assert flops("reflow", reflow_nfe=7) == 7 * student.flops(FACTS["student"], [1, 8, 8])
    assert flops("reflow", reflow_nfe=7, reflow_guidance=1.0) == 2 * flops("reflow", reflow_nfe=7)


@pytest.mark.parametrize("coupling", ["independent", "minibatch-ot", "semidiscrete-ot", "reflow"])
def test_a_plan_has_the_bytes_of_every_coupling_and_the_products_of_those_that_have_any(coupling: str) -> None:
    config = stage.PairsConfig(coupling=coupling, draws=2)
    plan = estimate.estimate(config, FACTS, [1])
    assert plan["pairs"] == 12_000
    assert "hours" not in plan
    assert ("FLOPs" in estimate.as_text(plan)) == (coupling != "independent")
    cost = stage.cost(config, FACTS, None)
    assert (cost.count, cost.unit, cost.bytes) == (12_000, "pairs", plan["bytes"]["float16"])
    assert bool(cost.flops) == (coupling != "independent")


FIXTURES = Path(__file__).parents[2] / "fixtures"
RECIPES = [*FIXTURES.glob("store-format-1/*/spec.json"), *FIXTURES.glob("*/made/pairs/*/spec.json")]


@pytest.mark.parametrize("fixture", sorted(RECIPES))
def test_a_recipe_of_before_is_written_as_it_was(fixture: Path) -> None:
    stored = atomic.read_json(fixture)["store"]
    assert read_spec(fixture.parent).to_dict() == stored


@pytest.mark.parametrize("coupling", ["nfm", "custom"])
def test_noise_that_no_seed_draws_must_be_stored(coupling: str) -> None:
    config = stage.PairsConfig(coupling=coupling, codec="seeded", custom="own:noise")
    facts = {"images": 100, "image_shape": SHAPE}
    with pytest.raises(
        Unfit, match=f"pairs.codec = 'seeded': the noise of coupling {coupling} is no function"
    ) as error:
        pairs_recipe.planned_spec(config, facts, config.codec)
    assert "independent, minibatch-ot, semidiscrete-ot, reflow" in str(error.value)


@pytest.mark.parametrize(("coupling", "more"), [("independent", ["seeded"]), ("nfm", [])])
def test_a_plan_counts_the_bytes_of_the_codecs_that_the_coupling_can_have(coupling: str, more: list[str]) -> None:
    config = stage.PairsConfig(coupling=coupling)
    facts = {"images": 10_000, "image_shape": (3, 64, 64), "teacher": TeacherConfig()}
    sizes = estimate.estimate(config, facts, [1], rate=1.0)["bytes"]
    assert [*sizes] == ["float32", "float16", "int8", *more]
    assert [*sizes.values()] == sorted(sizes.values(), reverse=True)


def test_a_coupling_that_reflow_would_take_is_checked_where_it_is_written() -> None:
    with pytest.raises(ValidationError, match=r"reflow_of\n.*coupling 'independant' is unknown; there are "):
        stage.PairsConfig(reflow_of="independant")
    assert stage.PairsConfig(reflow_of="nfm:soften=0.5").reflow_of == "nfm:soften=0.5"
