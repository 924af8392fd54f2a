"""A shape, a rate and a count are written in one way, wherever they are told."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.stages.display import units
from nfm.storage.errors import by

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("pipeline", "stages", "storage", "trainers/couplings", "trainers/models")  # metrics have features, [N, D]


def files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def told() -> Iterator[tuple[str, ast.expr]]:
    """(place, value) of everything that is put into a text."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FormattedValue):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def raw_shape(value: ast.expr) -> bool:
    """Whether a tuple of sizes is told as Python writes it: `x.shape`, `list(x.shape)`, `x.shape[1:]`."""
    while isinstance(value, ast.Call | ast.Subscript):
        if isinstance(value, ast.Subscript):
            if not isinstance(value.slice, ast.Slice):
                return False
            value = value.value
        elif isinstance(value.func, ast.Name) and value.func.id in ("list", "tuple", "str") and value.args:
            value = value.args[0]
        else:
            return False
    return isinstance(value, ast.Attribute | ast.Name) and ast.unparse(value).split(".")[-1].endswith("shape")


def test_no_message_writes_a_shape_as_python_does() -> None:
    header = "storage/layouts/npy.py"  # a text for numpy to read
    assert not [place for place, value in told() if raw_shape(value) and not place.startswith(header)]


@pytest.mark.parametrize(
    ("code", "raw"),
    [("x.shape", True), ("list(field.shape)", True), ("shape[1:]", True), ("x.shape[0]", False),
     ("by(x.shape)", False)],
)  # fmt: skip
def test_a_shape_as_python_writes_it_is_noticed(code: str, raw: bool) -> None:
    assert raw_shape(ast.parse(code, mode="eval").body) is raw


def test_rates_are_written_by_one_function() -> None:
    """No text has `.../s` behind a number that it formats itself, but a number of bytes."""
    found = []
    for path in files():
        if path.name != "units.py":
            for line, text in enumerate(path.read_text("utf-8").splitlines(), 1):
                if re.search(r":[^{}\"']*[gf]\} (?:\w+|\{[^}]*\})/s", text):
                    found.append(f"{path.relative_to(ROOT)}:{line}")
    assert not found


@pytest.mark.parametrize(
    ("rate", "said"),
    [(1000, "1,000 images/s"), (999.6, "1,000 images/s"), (12345.6, "12,346 images/s"), (104.3, "104 images/s"),
     (2.345, "2.3 images/s"), (0.5, "0.5 images/s"), (5, "5 images/s"), (0.0123, "0.012 images/s")],
)  # fmt: skip
def test_a_rate_has_no_exponent(rate: float, said: str) -> None:
    assert units.rate(rate, "images") == said


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [(12345.678, 4, "12,350"), (0.25, 4, "0.25"), (1e6, 3, "1,000,000"), (-1.23456, 3, "-1.23"), (0.0, 4, "0"),
     (1.5e-5, 2, "1.5e-05"), (2.5e18, 2, "2.5e+18"), (float("nan"), 3, "nan"), (float("inf"), 3, "inf")],
)  # fmt: skip
def test_a_figure_has_its_digits(value: float, digits: int, said: str) -> None:
    assert units.figure(value, digits) == said


def test_a_shape_is_its_sizes() -> None:
    assert by((3, 64, 64)) == "3x64x64"
    assert by(()) == "one value"
