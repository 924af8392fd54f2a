"""Values of the config: every number has a range without nan, true is not 1, and messages use no internal words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nfm.pipeline.config import ConfigError, RunConfig, load
from nfm.stages.base import _types

FIELDS = {
    f"{section}.{name}": _types(field)
    for section, of in RunConfig.model_fields.items()
    for name, field in of.annotation.model_fields.items()  # type: ignore[union-attr]
}
NUMBERS = [name for name, types in FIELDS.items() if types & {int, float} and bool not in types]
ANY_WHOLE = {"data.seed", "data.first_label", "report.seed"}  # negative ones are as good
WORDS = ("constrained", "literal[", "function-", "Value error", "Input should be a valid tuple")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text("[data]\n", encoding="utf-8")
    return path


def spelled(name: str, value: str) -> str:
    types: set[Any] = FIELDS[name]
    if any(getattr(kind, "__origin__", None) is dict for kind in types):
        return f"{name}={{independent={value}}}"
    return (
        f"{name}=[{value}]" if any(getattr(kind, "__origin__", None) is tuple for kind in types) else f"{name}={value}"
    )


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_field_refuses_values_that_are_not_numbers(config: Path, name: str) -> None:
    values = ["nan", "inf", "-inf", "true", f"{10**30}", "1e300" if int in FIELDS[name] else "-1e300", '"x"']
    for value in values if name in ANY_WHOLE else [*values, "-1000000"]:
        with pytest.raises(ConfigError) as caught:
            load(config, [spelled(name, value)])
        told = str(caught.value)
        section, field = name.split(".")
        given = f"--set {spelled(name, value)}"
        assert told.startswith((f"{given}: {name}", f"config {config} with {given}: {section}: ")), value
        assert field in told or (field == "mixture" and "shares" in told)
        assert not any(word in told for word in WORDS), told


@pytest.mark.parametrize("name", [name for name, types in FIELDS.items() if bool in types])
def test_every_boolean_field_refuses_other_values(config: Path, name: str) -> None:
    for value in ("nan", "2", '"x"', "[true]"):
        with pytest.raises(ConfigError, match=name):
            load(config, [f"{name}={value}"])


def test_a_byte_order_mark_at_the_start_of_the_file_is_ignored(config: Path) -> None:
    config.write_bytes(b'\xef\xbb\xbf[data]\nname = "\xc3\xa9"\n')
    assert load(config).data.name == "é"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[data]\nname = "\xe9"\n', "save the file as UTF-8"),
        ("[data]\n".encode("utf-16"), "save the file as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_binary_file_is_refused_with_the_remedy(tmp_path: Path, data: bytes | None, says: str) -> None:
    path = tmp_path / "run.toml"
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        load(path)
