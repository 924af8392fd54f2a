"""Config fields take places by the one rule, and no config holds a secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from nfm.pipeline.config import RunConfig
from nfm.stages.base import LocalField, PlaceField
from nfm.stages.data.config import DataConfig
from nfm.stages.data.latents.config import VaeField
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.pairs.config import PairsConfig

# Fields of text that name no place; a new one is to be entered here, or to be a LocalField.
NO_PLACES = {
    *("data.debian_package", "data.classes", "data.image_decoder", "data.name", "data.licence", "data.origin"),
    *("data.images", "data.labels", "data.background", "data.letters", "data.captions"),
    *(
        "pairs.coupling",
        "pairs.layout",
        "pairs.codec",
        "pairs.executor",
        "student.arch",
        "data.source",
        "pairs.custom",
        "pairs.reflow_of",
        "pairs.reflow_solver",
        "pairs.reflow_grid",
        *("pairs.ray_address", "teacher.ray_address", "student.ray_address", "features.ray_address"),
    ),
    *("student.mixture", "evaluate.baselines", "compare.couplings"),
    "latents.options",
    "latents.executor",
    "latents.ray_address",
    *("teacher.model", "teacher.options", "student.model", "student.options"),
    *("student.times", "student.objective", "student.sampler", "evaluate.ema"),
}


def holds_text(annotation: Any) -> bool:
    return annotation is str or any(holds_text(part) for part in get_args(annotation))


def test_every_config_field_that_is_text_takes_places_by_the_rule_or_names_none() -> None:
    seen = set()
    for name, section in RunConfig.model_fields.items():
        for field, info in section.annotation.model_fields.items():  # type: ignore[union-attr]
            key = f"{name}.{field}"
            if not holds_text(info.annotation) or field == "device":
                continue
            seen.add(key)
            local = info.annotation in (LocalField | None, PlaceField | None, VaeField | None)
            assert local != (key in NO_PLACES), f"{key}: is it a place? See nfm.pipeline.cli.options"
    assert seen > NO_PLACES


def test_a_field_names_a_local_path_as_an_argument_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataConfig(path="~/data").path == str(tmp_path / "data")
    assert EvaluateConfig(inception_weights="file:///a%20b").inception_weights == "/a b"
    assert PairsConfig(student="student/ab12").student == "student/ab12"
    assert DataConfig(path="a b%20c#d?e").path == "a b%20c#d?e"


def test_the_traceback_of_a_shard_that_is_set_aside_holds_no_secret(tmp_path: Path) -> None:
    from nfm.stages.executors.jobs import Job, Outcome
    from nfm.stages.pairs.production import failure_path, produce
    from tests.support.recorder import Recorder

    failed = Outcome(Job("d000-s00000", "a"), error="Traceback\nOSError: s3://key:secret@host/x")
    assert [one.job.name for one in produce(tmp_path, iter([failed]), 1, Recorder(), 0, 1)] == ["d000-s00000"]
    assert failure_path(tmp_path, "d000-s00000").read_text() == "Traceback\nOSError: s3://***@host/x"


@pytest.mark.parametrize("text", ["s3://bucket/x", "s3:/bucket/x", "s4://x", "", "~no-such-user/x"])
def test_a_field_that_is_no_local_path_is_refused(text: str) -> None:
    for section, field in ((DataConfig, "path"), (EvaluateConfig, "inception_weights"), (PairsConfig, "student")):
        with pytest.raises(ValidationError, match=field):
            section.model_validate({field: text})


@pytest.mark.parametrize(
    "values",
    [
        {"path": "s3://k:secret@h/x"}, {"origin": "got from https://secret@host/x on Monday"}, {"name": "s3://k:secret@h"},
        {"classes": ["cat", "https://h/x?token=secret"]}, {"seed": "s3://k:secret@h"},
    ],
)  # fmt: skip
def test_a_config_holds_no_secret(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="URL with a key"):
        DataConfig.model_validate(values)
