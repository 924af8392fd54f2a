"""An error that begins with a field of the config and its value, or with an option, is wrong use: exit code 2."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.pipeline.artifacts.artifact import ArtifactError, WrongArtifact
from nfm.pipeline.cli import exits
from nfm.pipeline.config import ConfigError, RunConfig
from nfm.stages.base import StageError, Unfit
from nfm.storage.errors import NoPlace, StorageError, WrongUse

ROOT = Path(__file__).resolve().parents[3]
FIELD = re.compile(rf"(--[a-z]|({'|'.join(RunConfig.model_fields)})\.[a-z_]+ =)")
OF_WORK = {StageError.__name__, ArtifactError.__name__, StorageError.__name__}


def blamed(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, beginning of the text) of errors of failed work that blame a field or an option."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            text = node.exc.args[0] if node.exc.args else None
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            words = "".join(str(part.value) if isinstance(part, ast.Constant) else "?" for part in parts)
            if node.exc.func.id in OF_WORK and FIELD.match(words):
                yield node.lineno, words


@pytest.mark.parametrize("room", ["pipeline", "stages"])
def test_what_blames_a_field_or_an_option_is_raised_as_wrong_use(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    found = {str(path): told for path in files if (told := list(blamed(ast.parse(path.read_bytes()))))}
    assert not found, "raise Unfit or WrongArtifact"


def test_the_check_sees_such_an_error() -> None:
    assert list(blamed(ast.parse('raise StageError(f"teacher.patch = {patch}: too large")')))
    assert list(blamed(ast.parse('raise ArtifactError("--nfe 8: odd")')))
    assert not list(blamed(ast.parse('raise StageError(f"{path}: damaged")')))


@pytest.mark.parametrize("error", [Unfit("x"), WrongArtifact("x"), ConfigError("x"), NoPlace("x", "y"), WrongUse("x")])
def test_wrong_use_ends_with_2(error: Exception) -> None:
    import click

    @click.command()
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        exits.run(command)
    assert stopped.value.code == 2
