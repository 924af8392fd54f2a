"""The import arrows: pipeline -> stages -> {storage, trainers}; nobody else knows anybody."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_KNOW = {
    "pipeline": (
        *("nfm.pipeline", "nfm.stages", "nfm.storage.errors"),
        *("nfm.storage.files.atomic", "nfm.storage.files.paths", "nfm.storage.files.small_files"),
        "nfm.storage.files.parallel",
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
    assert not any("tarflow" in name or "teacher" in name for name in imported(ROOT / "stages/trained/student.py"))
    assert not any("tarflow" in name for name in imported(ROOT / "stages/trained/training.py"))


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
