"""Commands, options, make targets and files in README and docs exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from nfm import storage
from nfm.pipeline.cli import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = ROOT / "docs/commands.md"
MADE = {"index.md", "changelog.md", "tutorial.md"}  # by docs/site.py, of files that are no pages of docs/
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def leaves(command: click.Command, words: tuple[str, ...] = ("nfm",)) -> Iterator[tuple[str, ...]]:
    """The words of every command that is not a group, and not one that nfm gives itself."""
    if command.hidden:
        return
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, (*words, name))
    else:
        yield words


def targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def snippets(text: str) -> Iterator[str]:
    """Lines of code blocks without the words beside them, and code within sentences."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.split(r" {3,}|\s#\s", line.removeprefix("$ ").strip())[0]
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)))


def fault_of(line: str) -> str:
    """What is wrong with an `nfm` command as it stands in a page; empty when nothing is."""
    words = shlex.split(re.sub(r"[\[\]]", " ", line))[1:]
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        for name in words[0].split("|"):
            if name not in command.commands:
                return f"there is no command {name!r}"
        command, words = command.commands[name], words[1:]
    options = [part for word in words for part in (word.split("|") if word.startswith("-") else [word])]
    try:
        command.make_parser(click.Context(command, help_option_names=["-h", "--help"])).parse_args(options)
    except click.NoSuchOption as error:
        return error.format_message()
    except click.UsageError:
        return ""  # a value left out, as where a sentence names an option
    return ""


def slugs(path: Path) -> set[str]:
    """The anchors of a page's headings, where GitHub and the site, which makes one - of several, give the same."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", path.read_text("utf-8")), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return {anchor for anchor in anchors if "--" not in anchor}


def test_every_command_and_every_target_is_described() -> None:
    text = COMMANDS.read_text("utf-8")
    missing = [" ".join(words) for words in leaves(cli) if not re.search(rf"^{' '.join(words)}\b", text, re.MULTILINE)]
    missing += [name for name in targets() if f"| `make {name}` |" not in text]
    assert not missing


def test_every_public_name_of_the_store_is_described() -> None:
    described = re.findall(r"^::: nfm\.storage\.(\w+)$", (ROOT / "docs/store-api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(described) == sorted(storage.__all__)


def test_every_page_has_its_place_in_the_site() -> None:
    listed = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted({path.name for path in (ROOT / "docs").glob("*.md")} | MADE)


@page
def test_commands_in_the_pages_exist_with_their_options(path: Path) -> None:
    lines = [line for line in snippets(path.read_text("utf-8")) if line.startswith("nfm ")]
    assert not {line: fault for line in lines if (fault := fault_of(line))}


@pytest.mark.parametrize(
    "line", ["nfm bench store", "nfm run pairs --warkers 4", "nfm pairs info|tail S", "nfm audit [--quick|--sloppy]"]
)
def test_a_command_or_option_that_is_not_there_is_noticed(line: str) -> None:
    assert fault_of(line)


@page
def test_make_targets_and_modules_in_the_pages_exist(path: Path) -> None:
    for line in snippets(path.read_text("utf-8")):
        if match := re.match(r"make ([a-z0-9-]+)", line):
            assert match[1] in targets(), line
        if match := re.match(r"python -m (benchmarks[\w.]*)", line):
            assert importlib.util.find_spec(match[1]), line


@page
def test_links_and_anchors_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(FENCE.sub("", path.read_text("utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in slugs(target), link
