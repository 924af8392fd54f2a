"""Which folder may import which (pipeline -> stages -> {storage, trainers}), and how large a folder may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_KNOW = {
    "pipeline": (
        *("nfm.pipeline", "nfm.stages"),
        *("nfm.storage.errors", "nfm.storage.files"),  # names, places, locks: what is not about pairs
        *("nfm.storage.ledger.manifests", "nfm.storage.ledger.standing"),  # the newest generation; what completes it
    ),
    "stages": ("nfm.stages", "nfm.storage", "nfm.trainers"),
    "storage": ("nfm.storage",),
    "trainers": ("nfm.trainers",),
}


def imported(path: Path) -> set[str]:
    """Every `nfm` module that a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; write `from nfm.… import`"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "nfm"}


@pytest.mark.parametrize("folder", MAY_KNOW)
def test_a_folder_imports_only_what_it_may_know(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            allowed = any(name == known or name.startswith(f"{known}.") for known in MAY_KNOW[folder])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_student_trains_without_the_teacher_being_imported() -> None:
    for path in (ROOT / "stages/trained/student").iterdir():
        assert path.is_dir() or not any("tarflow" in name or "teacher" in name for name in imported(path))
    assert not any("tarflow" in name for name in imported(ROOT / "stages/trained/training/__init__.py"))


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_command_starts_without_torch_and_ray() -> None:
    assert not {"torch", "ray", "sklearn", "matplotlib", "PIL"} & loaded_by(
        "import nfm.pipeline.cli, nfm.pipeline.graph"
    )


def test_the_reader_needs_numpy_and_pyarrow_alone() -> None:
    loaded = loaded_by("import nfm.storage")
    assert not {"torch", "ray", "zarr", "webdataset", "nfm.stages", "nfm.trainers", "nfm.pipeline"} & loaded


# Inside the folders: what each package, or file at the top, may import of its own folder.
ARROWS: dict[str, dict[str, str]] = {
    "storage": {
        "errors": "",
        "files": "errors",
        "format": "errors files",
        "layouts": "errors files format",
        "ledger": "errors files format layouts",
        "reading": "errors files format layouts",
        "dataset": "errors files format layouts reading",
        "verify": "errors files format layouts ledger",
        "store": "errors files format layouts ledger reading",
        "mixture": "errors files format layouts reading store",
        "export": "errors files format layouts ledger store",
    },
    "trainers": {
        "models": "training",
        "metrics": "",
        "nfe": "",
        "checkpoint": "",
        "training": "checkpoint",
        "flow_matching": "training",
        "likelihood": "models training",
        "couplings": "models training",
        "solvers": "nfe",
        "loop": "checkpoint training",
    },
    "stages": {
        "base": "",
        "data": "base couplings display executors trained",
        "couplings": "base",
        "display": "base couplings",
        "trained": "base couplings display",
        "encoding": "base couplings display trained executors",
        "executors": "base couplings trained",
        "pairs": "base couplings display trained encoding executors",
        "stores": "base couplings display trained encoding pairs",
        "evaluation": "base couplings display trained",
        "report": "base couplings display trained evaluation pairs",
    },
    "pipeline": {
        "artifacts": "",
        "submit": "",
        "config": "",
        "graph": "artifacts config",
        "builder": "artifacts config graph",
        "prechecks": "artifacts config graph",
        "console": "artifacts",
        "runner": "artifacts builder config console graph prechecks",
        "upkeep": "artifacts builder config graph submit",
        "overview": "artifacts config console graph prechecks runner",
        "cli": "artifacts builder config console graph prechecks overview runner submit upkeep",
    },
}
LIBRARY = [path for folder in MAY_KNOW for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_ENTRIES = 12


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("nfm", *(parts[:-1] if parts[-1] == "__init__" else parts)))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Which modules of the library each module imports."""
    modules = {module_of(path): path for path in LIBRARY}

    def module(name: str) -> str:
        return name if name in modules else name.rpartition(".")[0]

    return {name: {module(one) for one in imported(path)} & modules.keys() - {name} for name, path in modules.items()}


@pytest.mark.parametrize("folder", ARROWS)
def test_a_package_imports_only_those_that_it_may_know(folder: str, graph: dict[str, set[str]]) -> None:
    allowed = {name: {name, *others.split()} for name, others in ARROWS[folder].items()}
    for module, others in graph.items():
        here = module.split(".")[1:3]
        if here[0] != folder or len(here) < 2:  # the folder's own __init__ is its public face
            continue
        known = {other.split(".")[2] for other in others if other.split(".")[1] == folder and other.count(".") > 1}
        assert known <= allowed[here[1]], f"{module} imports {known - allowed[here[1]]} of {folder}"


def test_no_files_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    left = dict(graph)
    while ends := [name for name, others in left.items() if not others & left.keys()]:
        for name in ends:
            del left[name]
    assert not left, f"circles among {sorted(left)}"


@pytest.mark.parametrize("folder", [*MAY_KNOW, "tests"])
def test_a_folder_has_at_most_twelve_entries(folder: str) -> None:
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    folders |= {parent for one in folders for parent in one.parents if parent.is_relative_to(ROOT / folder)}
    for one in folders:
        entries = [entry.name for entry in one.iterdir() if entry.name != "__pycache__"]
        assert len(entries) <= MOST_ENTRIES, f"{one.relative_to(ROOT)} has {len(entries)} entries"


def test_nobody_imports_a_private_name_of_another_file() -> None:
    for path in LIBRARY:
        private = [name for name in imported(path) if any(part.startswith("_") for part in name.split("."))]
        assert not [name for name in private if "__" not in name], f"{path.relative_to(ROOT)} imports {private}"


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(module_of(path) for path in LIBRARY if path.name == "__init__.py")
