"""A user's own function, `module:function`: where its file is, its digest, and the function loaded from those bytes.

`field` is the field of the config that names it: a coupling by default, or a part of a student. Whoever sends a store
sends the name of a function with it, and perhaps the module beside it. So nothing here imports a module but `load`,
which encoding, training and sampling call; an audit does where its user has said that the code may run (`Allowed`).
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
_PLAIN = (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict)  # none of them can be called


@dataclass(frozen=True)
class Allowed:
    """The custom functions that an audit may run, by the SHA-256 of their files.

    `say` announces each before it runs.
    """

    digests: frozenset[str] = frozenset()
    say: Callable[[str], None] = lambda _: None


NOBODYS = Allowed()


def source_file(named: str | None, field: str = FIELD) -> Path:
    """The file of the module that `module:function` names, on Python's path or in the current folder; nothing is run.

    Raises StageError if the text has another form, or if the module is not found.
    """
    module, _, function = (named or "").partition(":")
    if not module or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise Unfit(f"{field} = {named!r}: a function is named as `module:function`; name one")
    with importable(Path.cwd()):
        importlib.invalidate_caches()
        found = _find(module)
    if found is not None and found.origin in ("frozen", "built-in"):
        raise Unfit(
            f"{field} = {named!r}: {module} is a part of Python itself, which has no file to be recorded; name a "
            "function of a module of yours"
        )
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise Unfit(
            f"{field} = {named!r}: there is no module {module} on Python's path or in {Path.cwd()}; run nfm where "
            f"{module.split('.')[0]} is, or set PYTHONPATH"
        )
    return Path(found.origin).resolve()


def check(file: Path, named: str, field: str = FIELD) -> None:
    """Raises Unfit where the text of the module shows that it has no such function, or one that takes other arguments
    than those of a coupling.

    Nothing is run: a name that is imported, assigned or made in another way passes here, and `load` says the rest.
    """
    name = named.partition(":")[2]
    try:
        text = ast.parse(_source(file, field), str(file))
    except (SyntaxError, ValueError) as error:
        raise Unfit(f"{field} = {named!r}: {file} is no Python: {error}; mend it") from error
    made = {found.name: found for found in _statements(text) if isinstance(found, ast.FunctionDef)}
    if name in made:
        if field == FIELD:
            _check_arguments(made[name].args, file, named)
        return
    ways = sum(_may_name(found, name) for found in _statements(text))
    values = [value for found in _statements(text) if (value := _value_of(found, name)) is not None]
    if ways == 0:
        near = nearest(name, made)
        raise Unfit(f"{field} = {named!r}: {file} has no function {name!r}{near}; define it or name another")
    if ways == len(values):
        raise Unfit(f"{field} = {named!r}: {name} in {file} is {values[-1]:.80}, no function; name a function")


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


def _value_of(found: ast.AST, name: str) -> str | None:
    """The value that a statement gives to a name, where it is plain text, a number, a list and the like; else None."""
    if not isinstance(found, ast.Assign | ast.AnnAssign):
        return None
    targets = found.targets if isinstance(found, ast.Assign) else [found.target]
    named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return ast.unparse(found.value) if named and isinstance(found.value, _PLAIN) else None


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


def digest(file: Path, field: str = FIELD) -> str:
    """SHA-256 of the module's file, which decides the result; what it imports is not in it."""
    return atomic.digest(_source(file, field))


def _source(file: Path, field: str) -> bytes:
    try:
        return read_bytes(file.resolve(), _MOST_SOURCE)
    except (OSError, StorageError) as error:
        raise StageError(f"{file}: the module of {field} cannot be read ({error}); is it on every node?") from error


def announced(file: str | Path | None, named: str, sha256: str, field: str = FIELD) -> str:
    """Whose code is about to run, in a line. Raises StageError where the file has another digest: none of it runs."""
    if file is not None:
        _recorded(Path(file), named, sha256, field)
    return f"{field} = {named!r} runs the code of {file}, SHA-256 {sha256}"


def not_run(what: str, named: str, sha256: str, allowed: Allowed) -> str:
    """The statement of an audit that left something undone, because it takes code that nobody allowed."""
    others = ", ".join(sorted(digest[:12] for digest in allowed.digests))
    return (
        f"{what}: their function {named!r} is code, and an audit runs none "
        f"unasked. When you know the file of SHA-256 {sha256}, give --run-custom with it, or "
        f"audit with -c CONFIG, the config of yours that names it{f'; allowed were others, {others}' if others else ''}"
    )


def _recorded(file: Path, named: str, sha256: str, field: str) -> bytes:
    """The bytes of a module's file, which have this digest."""
    source = _source(file, field)
    if (there := atomic.digest(source)) != sha256:
        raise StageError(
            f"{file}: not the file that was recorded: {field} = {named!r} was of SHA-256 {sha256}, this one is of "
            f"{there}. Restore it, or run the stage again from the changed one, which makes an artifact of its own"
        )
    return source


def changed(named: str, sha256: str, field: str = FIELD) -> str:
    """Says that the file here is another than that of this digest; empty if it is the same, or there is none."""
    try:
        file = source_file(named, field)
        there = digest(file, field)
    except StageError:
        return ""
    return "" if there == sha256 else f"; {file} is another one, of SHA-256 {there}"


def load(file: Path, named: str, sha256: str, field: str = FIELD) -> Callable[..., Any]:
    """The function, from the bytes of `file` that have this digest. Raises StageError where they have another, where
    the module cannot be executed, and, by the function's name, where a call of it fails.
    """
    module, function = named.split(":")
    source = _recorded(file, named, sha256, field)
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    before = sys.modules.get(module)
    sys.modules[module] = loaded
    try:
        with importable(_root(file, module)):
            # From the bytes that were hashed: bytecode beside the file may be of another.
            exec(compile(source, str(file), "exec"), loaded.__dict__)
    except BaseException as error:
        del sys.modules[module]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise StageError(f"{field} = {named!r}: {file} cannot be executed: {_told(error)}; mend it") from error
    finally:
        if before is not None:
            sys.modules[module] = before
    found = getattr(loaded, function, None)
    if not callable(found):
        raise Unfit(f"{field} = {named!r}: {file} has no function {function!r}; define it or name another")

    def called(*arguments: Any, **options: Any) -> Any:
        try:
            with importable(_root(file, module)):  # for what it imports when it is called
                return found(*arguments, **options)
        except (Exception, SystemExit) as error:  # which would end the command with its code and no word
            raise StageError(f"{field} = {named!r}: the function raised {_told(error)}; mend it in {file}") from error

    called.__wrapped__ = found  # type: ignore[attr-defined]  # whose signature is looked at
    return called


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


def called_beside(folder: Path, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
    """What `work` gives, where modules of this folder are found too: that of the command, for a process elsewhere."""
    with importable(folder):
        return work(*arguments, **options)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Imports find modules of this folder too, behind all others."""
    path = str(folder)
    sys.path.append(path)
    try:
        yield
    finally:
        last = max((place for place, each in enumerate(sys.path) if each == path), default=None)
        if last is not None:  # the folder may stand further ahead too, and stays there
            del sys.path[last]
