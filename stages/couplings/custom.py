"""A user's own coupling, `module:function`: its file, the digest of the file, and the function loaded from it.

A store that somebody sends names such a function, and the module may be beside it. So nothing here imports a module
except `load`, which only encoding calls. An audit calls it only if the user has allowed this code (`Allowed`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from nfm.stages.base import StageError, Unfit
from nfm.storage.errors import StorageError
from nfm.storage.errors.arguments import nearest
from nfm.storage.files import atomic
from nfm.storage.files.small_files import read_bytes

FIELD = "pairs.custom"
ARGUMENTS = ("images", "labels", "rng")
_MOST_SOURCE = 16 << 20  # bytes of a module


@dataclass(frozen=True)
class Allowed:
    """The custom functions that an audit may run, by the SHA-256 of their files.

    `say` announces each before it runs.
    """

    digests: frozenset[str] = frozenset()
    say: Callable[[str], None] = lambda _: None


NOBODYS = Allowed()


def source_file(named: str | None) -> Path:
    """The file of the module in `module:function`, on Python's path or in the current folder. Nothing is run.

    Raises StageError if the text has another form, or if the module is not found.
    """
    module, _, function = (named or "").partition(":")
    if not module or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise Unfit(f"{FIELD} = {named!r}: coupling 'custom' takes the noise of `module:function`; name one")
    with _importable(Path.cwd()):
        importlib.invalidate_caches()
        found = _find(module)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise Unfit(
            f"{FIELD} = {named!r}: there is no module {module} on Python's path or in {Path.cwd()}; run nfm where "
            f"{module.split('.')[0]} is, or set PYTHONPATH"
        )
    return Path(found.origin).resolve()


def check(file: Path, named: str) -> None:
    """Raises Unfit where the text of the module shows that it has no such function, or one that takes other arguments.

    Nothing is run: a name that is imported, assigned or made in another way passes here, and `load` says the rest.
    """
    name = named.partition(":")[2]
    try:
        text = ast.parse(_source(file), str(file))
    except (SyntaxError, ValueError) as error:
        raise Unfit(f"{FIELD} = {named!r}: {file} is no Python: {error}; mend it") from error
    made = {found.name: found for found in _statements(text) if isinstance(found, ast.FunctionDef)}
    if name in made:
        _check_arguments(made[name].args, file, named)
    elif not any(_may_name(found, name) for found in _statements(text)):
        near = nearest(name, made)
        raise Unfit(f"{FIELD} = {named!r}: {file} has no function {name!r}{near}; define it or name another")


def _statements(block: ast.AST) -> Iterator[ast.AST]:
    """What is executed, or may be, when a module is imported: not the bodies of functions and classes."""
    for found in ast.iter_child_nodes(block):
        yield found
        if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _statements(found)


def _may_name(found: ast.AST, name: str) -> bool:
    if isinstance(found, ast.Name):  # assigned, or deleted: then `load` says so
        return found.id == name and not isinstance(found.ctx, ast.Load)
    if isinstance(found, ast.alias):
        return found.name == "*" or (found.asname or found.name.partition(".")[0]) == name
    if isinstance(found, ast.Call):
        return isinstance(found.func, ast.Name) and found.func.id in ("exec", "globals", "setattr", "vars")
    return getattr(found, "name", None) in (name, "__getattr__")


def _check_arguments(takes: ast.arguments, file: Path, named: str) -> None:
    places = len(takes.posonlyargs) + len(takes.args)
    must = places - len(takes.defaults)
    alone = [one.arg for one, default in zip(takes.kwonlyargs, takes.kw_defaults) if default is None]
    if must > len(ARGUMENTS) or (places < len(ARGUMENTS) and takes.vararg is None) or alone:
        raise Unfit(
            f"{FIELD} = {named!r}: the function in {file} takes ({ast.unparse(takes)}); it is called with "
            f"({', '.join(ARGUMENTS)}), in this order"
        )


def _find(module: str) -> ModuleSpec | None:
    """The file that an import of the module would use. A module of the same name that is already imported may be
    another.

    It searches folder by folder. importlib's own search would import, and so run, every package on the way.
    """
    top, *rest = module.split(".")
    specs = (finder.find_spec(top, None) for finder in sys.meta_path)
    found = next((spec for spec in specs if spec is not None), None)
    for part in rest:
        if found is None or found.submodule_search_locations is None:
            return None
        # By the last part of its name: with the whole name, a package without __init__.py would import its parent.
        found = PathFinder.find_spec(part, list(found.submodule_search_locations))
    return found


def digest(file: Path) -> str:
    """SHA-256 of the module's file. What the module imports is not included."""
    return atomic.digest(_source(file))


def _source(file: Path) -> bytes:
    try:
        return read_bytes(file.resolve(), _MOST_SOURCE)
    except (OSError, StorageError) as error:
        raise StageError(f"{file}: the module of {FIELD} cannot be read ({error}); is it on every node?") from error


def announced(file: str | None, named: str, sha256: str) -> str:
    """One line that says whose code is about to run."""
    return f"{FIELD} = {named!r} runs the code of {file}, SHA-256 {sha256}"


def load(file: Path, named: str, sha256: str) -> Callable[..., Any]:
    """The function, loaded from the bytes of `file`, which must have this digest.

    Raises StageError if they have another, or if the module cannot be executed. A later call that fails raises it too,
    with the function's name.
    """
    module, function = named.split(":")
    source = _source(file)
    if atomic.digest(source) != sha256:
        raise StageError(
            f"{file}: not the file that this store's pairs are made with, {FIELD} = {named!r} of digest {sha256[:12]}. "
            "Restore it, or run the pairs stage again from the changed one, which makes a store of its own"
        )
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    before = sys.modules.get(module)
    sys.modules[module] = loaded
    try:
        with _importable(_root(file, module)):
            # From the hashed bytes: a bytecode file beside it may be of another version.
            exec(compile(source, str(file), "exec"), loaded.__dict__)
    except BaseException as error:
        del sys.modules[module]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise StageError(f"{FIELD} = {named!r}: {file} cannot be executed: {_told(error)}; mend it") from error
    finally:
        if before is not None:
            sys.modules[module] = before
    found = getattr(loaded, function, None)
    if not callable(found):
        raise Unfit(f"{FIELD} = {named!r}: {file} has no function {function!r}; define it or name another")

    def function_of_shard(*arguments: Any) -> Any:
        try:
            with _importable(_root(file, module)):  # for imports inside the function
                return found(*arguments)
        except (Exception, SystemExit) as error:  # SystemExit would end the command without a message
            raise StageError(f"{FIELD} = {named!r}: the function raised {_told(error)}; mend it in {file}") from error

    return function_of_shard


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def rng(seed: int, draw: int, shard: int) -> np.random.Generator:
    """The random numbers of a shard: Philox, key (seed, "custom"), counter (0, shard, draw, 0); see storage.philox."""
    purpose = int.from_bytes(hashlib.sha256(b"custom").digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=seed | purpose << 64, counter=[0, shard, draw, 0]))


def _root(file: Path, module: str) -> Path:
    """The folder from which `module` is imported."""
    depth = module.count(".") + (file.name == "__init__.py")
    return file.parents[depth]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Adds this folder at the end of Python's path."""
    path = str(folder)
    sys.path.append(path)
    try:
        yield
    finally:
        sys.path.remove(path)
