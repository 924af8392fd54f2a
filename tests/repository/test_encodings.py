"""Text is read and written as UTF-8 for any locale: every call names the encoding."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Lab

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path for room in ("pipeline", "stages", "storage", "trainers", "benchmarks", "examples")
    for path in (ROOT / room).rglob("*.py")
)  # fmt: skip


def unnamed(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text and name no encoding."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in given or None in given:
            continue
        if name in ("read_text", "write_text") or "text" in given or "universal_newlines" in given:
            yield call.lineno
        elif name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
            # Of a Path the mode comes first, of the function the file does; a store or a URL is opened otherwise.
            modes = [value.value for value in [*call.args[:2], *([given["mode"]] if "mode" in given else [])]
                     if isinstance(value, ast.Constant) and isinstance(value.value, str)]  # fmt: skip
            modes = [mode for mode in modes if mode and set(mode) <= set("rwaxbt+")]
            builtin = isinstance(call.func, ast.Name)
            if (modes and "b" not in modes[0]) or (not modes and builtin and name == "open"):
                yield call.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_read_and_write_of_text_names_its_encoding(path: Path) -> None:
    assert not list(unnamed(ast.parse(path.read_bytes()))), "name encoding='utf-8'"


@pytest.mark.parametrize(
    "line",
    [
        "path.read_text()", "path.write_text(x)", "open(path)", "open(path, 'w')", "path.open('a')",
        "subprocess.run(c, text=True)", "open(path, mode='r')",
    ],
)  # fmt: skip
def test_the_check_sees_what_leaves_the_encoding_to_the_locale(line: str) -> None:
    assert list(unnamed(ast.parse(line)))


@pytest.mark.seconds(30)  # a process that starts from nothing: the locale is decided there
def test_commands_work_in_a_locale_of_ascii(empty: Lab) -> None:
    text = "# größer als é\n" + empty.config.read_text(encoding="utf-8")
    text = text.replace('source = "digits"', 'source = "digits"\nname = "zifférn"')
    empty.config.write_text(text, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    empty.wait(empty.script("run", "data", "-c", "tiny.toml", **ascii_only))
    assert empty.only("data").manifest()["dataset"]["name"] == "zifférn"
