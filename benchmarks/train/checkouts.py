"""Code of a peer's checkout, as it stands there: its modules, single functions, and the loop of its training script.

A training script cannot be called: it wants GPUs, files and packages that its steps have no need of. So its statements
are taken out of it by name and run here, where "cuda" is another device if the run is on one.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from nfm.stages.base import Unfit


class _Name(type):
    """Of classes that have any name inside, which are no more than that."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


class _Empty(ModuleType):
    """A module in which every name is a class with nothing in it."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _StandIns(MetaPathFinder, Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = fullname.partition(".")[0] in self.packages
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_ins(*packages: str) -> Iterator[list[str]]:
    """Which of these packages cannot be imported here; inside the block they seem to be there, with nothing in them.

    They are for imports whose names no training step calls.
    """
    missing = [package for package in packages if not _imports(package)]
    finder = _StandIns(missing)
    sys.meta_path.insert(0, finder)
    try:
        yield missing
    finally:
        sys.meta_path.remove(finder)
        _forget(missing)


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except Exception:  # not there, or for another torch than is here
        _forget([package])
        return False
    return True


def _forget(packages: Sequence[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def module(folder: Path, name: str) -> ModuleType:
    """The module or package of this name in the folder. Raises Unfit where it is not there or wants what is not."""
    package = folder / name / "__init__.py"
    path = package if package.exists() else folder / f"{name}.py"
    if not path.exists():
        raise Unfit(f"{folder}: there is no {name}.py; name a checkout of the peer's repository")
    places = [str(package.parent)] if path == package else None
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where a package's relative imports look
    try:
        spec.loader.exec_module(found)
    except ModuleNotFoundError as error:
        raise Unfit(f"{path}: needs the package {error.name}, which is not installed: install it") from error
    return found


class Script:
    """A training script, of which single statements are run on `device`."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path, self.device = folder / "train.py", device
        if not self.path.exists():
            raise Unfit(f"{folder}: there is no train.py; name a checkout of the peer's repository")
        self._tree = ast.parse(self.path.read_text(encoding="utf-8"))

    def define(self, function: str, names: dict[str, Any]) -> None:
        """Puts a function of the script, wherever it is defined, into `names`, which are its globals."""
        exec(self._code(ast.FunctionDef, lambda node: node.name == function, f"function {function}"), names)

    def loop(self, over: str) -> CodeType:
        """The loop over batches: `for ... in <over>`."""
        return self._code(
            ast.For, lambda node: isinstance(node.iter, ast.Name) and node.iter.id == over, f"loop over {over}"
        )

    def _code(self, kind: type[ast.stmt], fits: Callable[[Any], bool], what: str) -> CodeType:
        for node in ast.walk(self._tree):
            if isinstance(node, kind) and fits(node):
                moved = ast.fix_missing_locations(_OnDevice(self.device).visit(node))
                return compile(ast.Module([moved], []), str(self.path), "exec", dont_inherit=True)
        raise Unfit(f"{self.path}: has no {what}, which it had at the commit that docs/speed.md names: check that out")


class _OnDevice(ast.NodeTransformer):
    def __init__(self, device: str) -> None:
        self.device = device

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(self.device) if node.value == "cuda" else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """x.cuda() is x.to(device)."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda" and not node.args:
            node.func.attr, node.args = "to", [ast.Constant(self.device)]
        return node


def commit(folder: Path) -> str:
    """The commit that is checked out, or that it is unknown."""
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", check=False
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else "unknown: no git checkout"
