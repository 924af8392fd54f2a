"""Commands read places by one rule. An invalid place leaves nothing behind, and no secret in a URL is shown."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from nfm.pipeline.artifacts.artifact import artifacts_root, find
from nfm.pipeline.artifacts.lock import Lock
from nfm.pipeline.cli import cli, main
from nfm.pipeline.cli.options import LocalPath, Place
from nfm.pipeline.config import ConfigError, load
from nfm.pipeline.console import Console, StopRequest
from nfm.storage.errors import NoPlace
from tests.support.buckets.s3server import new_clients
from tests.support.commands import commands

ROOT = Path(__file__).resolve().parents[3]
# Parameters of text that name no place; a new one is entered here, or has a type of nfm.pipeline.cli.options.
NO_PLACES = {
    *("overrides", "ray_address", "address", "level", "couplings", "seeds", "name"),
    *("sbatch", "sbatch_seal", "before", "digests"),
}
URLS = ["s3://key:secret@host/x", "s3:/key:secret@host/x", "https://host/x?X-Amz-Signature=secret"]

Nfm = Callable[..., tuple[int, str]]


@pytest.fixture
def nfm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nfm:
    """nfm(*arguments) -> (exit code, all that it printed), in a folder with a config and nothing else."""
    (tmp_path / "tiny.toml").write_text('[data]\nsource = "digits"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NFM_ARTIFACTS", "artifacts")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nfm", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return code, out + err

    return run


PARAMETERS = [(path, parameter, command) for path, command in commands() for parameter in command.params]


def test_every_parameter_that_names_a_place_takes_it_by_the_rule() -> None:
    seen = set()
    for path, parameter, _ in PARAMETERS:
        where = f"nfm {' '.join(path)}, {parameter.name}"
        if isinstance(parameter.type, Place | LocalPath):
            seen.add(parameter.name)
            continue
        assert not isinstance(parameter.type, click.Path | click.File), where
        text = isinstance(parameter.type, click.types.StringParamType)
        assert not text or parameter.name in NO_PLACES, f"{where}: is it a place? See nfm.pipeline.cli.options"
    assert seen >= {"artifact", "store", "target", "config_path", "configs", "output", "file"}


@pytest.mark.parametrize("folder", ["pipeline", "stages", "storage", "benchmarks"])
def test_no_other_file_decides_what_a_place_is(folder: str) -> None:
    """What the rule replaced: other types of click, a look for `://`, a path that an environment variable names."""
    other = re.compile(
        r'click\.(Path|File)\(|"://" in|partition\("://"\)|environ(\.get\(|\[)"(NFM_ARTIFACTS|NFM_CACHE"|XDG)'
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / folder).glob("**/*.py"))
        if path.parent.name != "accelerator"  # runs where pydantic is not, which the rule's module needs
        for line in path.read_text().splitlines()
        if other.search(line)
    ]
    assert not found


REQUIRED = {
    "config_path": "tiny.toml",
    "stage": "pairs",
    "artifact": "data/none",
    "store": "pairs/none",
    "target": "out",
    "name": "caption",
    "file": "tiny.toml",
    "output": "out",
    "task": "0",
    "of": "1",
}


def line(path: tuple[str, ...], command: click.Command, chosen: click.Parameter, text: str) -> list[str]:
    """A command line with `text` for the chosen parameter, and whatever else the command must have."""
    words = [*path, *(["--slurm"] if path[0] == "submit" and chosen.name != "address" else [])]
    words += ["--ray"] if chosen.name == "address" else []
    for parameter in command.params:
        if parameter is chosen or parameter.required:
            lead = [max(parameter.opts, key=len)] if isinstance(parameter, click.Option) else []
            words += [*lead, text if parameter is chosen else REQUIRED[str(parameter.name)]]
    return words


def written(folder: Path) -> str:
    """Names and bytes of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "".join(f"{path}\n{path.read_bytes().decode('latin-1')}" for path in files)


@pytest.mark.parametrize("url", URLS)
def test_no_command_shows_or_writes_the_secret_of_a_url(nfm: Nfm, url: str, tmp_path: Path) -> None:
    tried = 0
    for path, parameter, command in PARAMETERS:
        text = isinstance(parameter.type, click.types.StringParamType) and parameter.name != "level"
        if not (text or isinstance(parameter.type, Place | LocalPath)):
            continue
        words = line(path, command, parameter, url)
        code, told = nfm(*words)
        assert "secret" not in told, words
        shows_only = path[0] == "submit" and parameter.name in ("address", "before", "sbatch", "sbatch_seal")
        assert code != 0 or shows_only, words
        assert "Traceback" not in told, told
        tried += 1
    assert tried > 40
    assert "secret" not in written(tmp_path)


def test_no_field_of_a_config_shows_the_secret_of_a_url(nfm: Nfm, tmp_path: Path) -> None:
    for override in (
        "data.path",
        "data.origin",
        "data.seed",
        "pairs.ray_address",
        "pairs.custom",
        "data.no_such",
        "x.y",
        "",
    ):
        code, told = nfm("run", "data", "-c", "tiny.toml", "--set", f"{override}={URLS[0]}")
        assert (code, "secret" in told) == (2, False), told
    (tmp_path / "tiny.toml").write_text(f'[data]\npath = "{URLS[0]}"\n')
    code, told = nfm("run", "data", "-c", "tiny.toml")
    assert (code, "secret" in told) == (2, False), told
    assert "data.path = 's3://***@host/x': a URL with a key" in told


def test_an_environment_does_not_show_the_secret_of_a_url(
    nfm: Nfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFM_ARTIFACTS", URLS[0])
    assert nfm("ls")[0] == 2
    assert "secret" not in nfm("ls")[1]
    monkeypatch.setenv("NFM_ARTIFACTS", "artifacts")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "k")
    monkeypatch.setenv("NFM_PATIENCE", "0.1")
    new_clients()
    code, told = nfm("pairs", "info", "s3://bucket/x")
    new_clients()
    assert (code, "secret" in told) == (1, False), told
    assert "AWS_ENDPOINT_URL is http://***@127.0.0.1" in told


@pytest.mark.parametrize(
    "command",
    [
        ("ls",), ("pairs", "info", "s3://bucket/x"), ("run", "data", "-c", "tiny.toml", "--set", "data.path=s3://b/x"),
        ("pairs", "verify", "s3://bucket/x"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_never_told_as_a_wrong_place(
    nfm: Nfm, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("NFM_PATIENCE", "x")
    if command == ("ls",):
        monkeypatch.setenv("NFM_ARTIFACTS", "s3://bucket/a")
    assert nfm(*command) == (2, "nfm: NFM_PATIENCE=x: write a number of seconds from 0 to 86400\n")


def test_an_unforeseen_error_shows_no_secret(nfm: Nfm, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**given: object) -> None:
        raise ValueError(f"{given} of {URLS[0]}")

    monkeypatch.setattr(cli.commands["ls"], "callback", fail)
    code, told = nfm("ls")
    assert (code, "secret" in told, "s3://***@host/x" in told) == (1, False, True), told


def test_events_messages_and_locks_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nfm", "pairs", "export", "x", URLS[0]])
    with Lock(tmp_path):
        console = Console("pairs", tmp_path / "events", StopRequest())
        console.say(f"cannot reach {URLS[0]}")
        console.log("FAIL", error=f"ValueError: {URLS[0]}", rows=[{"where": URLS[0]}])
        console.close()
        held = written(tmp_path)
    assert "export" in held
    assert held.count("s3://***@host/x") == 3
    assert "secret" not in held
    assert "cannot reach s3://***@host/x" in "".join(capsys.readouterr())


@pytest.mark.parametrize("text", ["s3:/bucket/x", "s4://bucket/x", "~no-such-user/x", "", "file:x", " s3://b/x"])
def test_an_argument_that_is_no_place_is_wrong_use_and_leaves_nothing_behind(
    nfm: Nfm, text: str, tmp_path: Path
) -> None:
    before = written(tmp_path)
    tried = 0
    for path, parameter, command in PARAMETERS:
        if isinstance(parameter.type, Place | LocalPath):
            code, told = nfm(*line(path, command, parameter, text))
            named = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else str(parameter.name).upper()
            assert code == 2, told
            assert re.search(rf"Invalid value for '.*{re.escape(named)}\]?'", told), told
            tried += 1
    assert tried > 20
    assert written(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_an_argument_where_only_local_paths_work_refuses_a_url_by_its_name(nfm: Nfm, tmp_path: Path) -> None:
    for path, parameter, command in PARAMETERS:
        if isinstance(parameter.type, LocalPath):
            code, told = nfm(*line(path, command, parameter, "memory://bucket/x"))
            assert code == 2
            assert "only a path of this machine works here" in told
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_the_artifacts_root_is_a_place_of_a_kind_that_can_hold_artifacts(
    nfm: Nfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, root in (
        ("~/art", "home/art"),
        (f"file://{tmp_path}/a%20b", "a b"),
        ("./s3:/x", "s3:/x"),
        ("a:b", "a:b"),
    ):
        monkeypatch.setenv("NFM_ARTIFACTS", text)
        assert artifacts_root().absolute() == tmp_path / root
    for text in ("", " "):
        monkeypatch.setenv("NFM_ARTIFACTS", text)
        assert artifacts_root() == Path("artifacts")
    monkeypatch.setenv("NFM_ARTIFACTS", "s3://bucket/art/")
    assert str(artifacts_root()) == "s3://bucket/art"
    for text in ("memory://x/art", "https://host/art", "s3:/bucket/art", "s4://x", "s3://"):
        monkeypatch.setenv("NFM_ARTIFACTS", text)
        code, told = nfm("run", "data", "-c", "tiny.toml")
        assert code == 2
        assert f"NFM_ARTIFACTS={text}: " in told
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    monkeypatch.setenv("NFM_ARTIFACTS", "~/art")
    code, told = nfm("run", "data", "-c", "tiny.toml", "--set", "data.limit=40")
    assert code == 0, told
    assert len(list((tmp_path / "home" / "art" / "data").iterdir())) == 1


def test_an_artifact_is_found_by_any_way_to_write_its_place(nfm: Nfm, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "a b"
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text('{"store": {}}')
    for text in ("~/a b", str(folder), f"file://{tmp_path}/home/a%20b", "home/a b", "./home/a b"):
        assert find(text).path.resolve() == folder
    with pytest.raises(NoPlace):
        find("s3:/bucket/x")


def test_a_config_file_is_a_local_place(nfm: Nfm, tmp_path: Path) -> None:
    assert load(f"file://{tmp_path}/tiny.toml") == load("tiny.toml") == load(tmp_path / "tiny.toml")
    for text in ("s3://bucket/x.toml", "s3:/bucket/x.toml"):
        with pytest.raises((NoPlace, ConfigError), match="s3:/"):
            load(text)
