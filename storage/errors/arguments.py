"""Rules for the arguments of public calls, one rule for each name, and a decorator that applies them.

A rule takes (name, value). It returns the value in the type that the code needs, or raises WrongArgument. Numbers are
accepted by value: 64.0 and numpy's 64 mean 64. True and "64" are not numbers.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nfm.storage.errors import StorageError, WrongUse, by

P = ParamSpec("P")
R = TypeVar("R")
Rule = Callable[[str, Any], Any]
_SHOWN = 80  # characters of a value in a message
_MOST = 2**63 - 1
MOST_EPOCH = 10**9  # so that positions over all epochs fit 64 bits


class WrongArgument(StorageError, WrongUse, ValueError):  # noqa: N818 - as the other errors, it says what is wrong
    """An argument with a value that is not allowed: its `name`, what is wrong, and what else Python may pass."""

    def __init__(self, name: str, said: str, otherwise: str = "") -> None:
        super().__init__(name, said, otherwise)
        self.name, self.said, self.otherwise = map(str, self.args)

    def __str__(self) -> str:
        return f"{self.name} {self.said}{self.otherwise and ', or '}{self.otherwise}"


def wrong(name: str, value: Any, must: str) -> WrongArgument:
    """The error for a value that breaks its rule; `must` says what the value must be."""
    return WrongArgument(name, f"is {shown(value)}: it must be {must}")


def shown(value: Any) -> str:
    """A value as short text for a message."""
    try:
        whole = " ".join(repr(value).split())
    except Exception:  # the object's own repr may fail
        whole = f"a {type(value).__name__}"
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}…"


def whole(low: int = 0, high: int = _MOST, or_none: str = "") -> Rule:
    """A whole number from `low` to `high`. If `or_none` says what None means, None is allowed too."""
    or_else = f", or None ({or_none})" if or_none else ""

    def rule(name: str, value: Any) -> Any:
        if value is None and or_none:
            return None
        number = _whole(value)
        if number is None or not low <= number <= high:
            open_ended = high == _MOST and (number is None or number < low)
            ends = f"at least {low}" if open_ended else f"{low} to {high}"
            raise wrong(name, value, f"a whole number, {ends}{or_else}")
        return number

    return rule


def real(must: str, holds: Callable[[float], bool]) -> Rule:
    """A finite number for which `holds` is true; `must` states the condition in words."""

    def rule(name: str, value: Any) -> float:
        number = _real(value)
        if not (math.isfinite(number) and holds(number)):
            raise wrong(name, value, must)
        return number

    return rule


def flag(name: str, value: Any) -> bool:
    """True or False, also numpy's."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise wrong(name, value, "True or False")
    return bool(value)


def one_of(choices: Collection[Any]) -> Rule:
    """One of a few names, or None if None is among them. The error suggests the nearest name."""

    def rule(name: str, value: Any) -> Any:
        if (value is None or isinstance(value, str)) and value in choices:
            return value
        raise wrong(name, value, " or ".join(map(repr, choices)) + nearest(value, choices))

    return rule


def text(name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text (str)")
    return value


def names(name: str, value: Any) -> tuple[str, ...]:
    """A list of names. A single str is refused, so that it is not split into letters."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        hint = f", as in {name}=[{value!r}]" if isinstance(value, str) else ""
        raise wrong(name, value, f"a list of names{hint}")
    found = tuple(value)
    if bad := [one for one in found if not isinstance(one, str)]:
        raise wrong(name, value, f"a list of names (str), and {shown(bad[0])} is none")
    if twice := [one for at, one in enumerate(found) if one in found[:at]]:
        raise wrong(name, value, f"a list of different names, and {twice[0]!r} is there twice")
    return found


def some_of(choices: Collection[str]) -> Rule:
    """A list of names that are all among `choices`. The error suggests the nearest one."""

    def rule(name: str, value: Any) -> tuple[str, ...]:
        found = names(name, value)
        for one in found:
            if one not in choices:
                raise WrongArgument(name, f"has {one!r}{nearest(one, choices)}; there are {', '.join(choices)}")
        return found

    return rule


def place(name: str, value: Any) -> Any:
    """A path or a URL. nfm.storage.files.places decides which ones are valid."""
    if isinstance(value, str | Path) or hasattr(value, "protocol"):  # a path of universal_pathlib
        return value
    if not isinstance(value, os.PathLike) or not isinstance(os.fspath(value), str):
        raise wrong(name, value, "a path or a URL (str or pathlib.Path)")
    return Path(value)


def numbers(name: str, value: Any) -> Any:
    """Whole numbers in one dimension (slots, rows), as an array of int64."""
    import numpy as np

    try:
        array = np.asarray(value)
        with np.errstate(invalid="ignore"):
            exact = array.astype(np.int64, copy=False) if array.dtype.kind in "iuf" else None
    except (TypeError, ValueError, OverflowError):
        array, exact = np.empty(0), None
    if exact is None or array.ndim != 1 or (array.dtype.kind != "i" and not (exact == array).all()):
        raise wrong(name, value, "whole numbers in one dimension, such as numpy.arange(10)")
    return exact


def function(name: str, value: Any) -> Any:
    """Something that can be called."""
    if not callable(value):
        raise wrong(name, value, "a function")
    return value


def instance(*kinds: type | str, none: bool = False) -> Rule:
    """An object of one of these classes; a class may be given by name. With `none`, None is allowed too."""
    words = [kind if isinstance(kind, str) else kind.__name__ for kind in kinds]

    def rule(name: str, value: Any) -> Any:
        if (value is None and none) or {base.__name__ for base in type(value).__mro__} & set(words):
            return value
        raise wrong(name, value, f"a {' or a '.join(words)}{' or None' if none else ''}")

    return rule


def checked_later(name: str, value: Any) -> Any:
    """Anything. Whether it is allowed depends on other values; the code that knows them raises WrongArgument."""
    return value


def or_none(rule: Rule) -> Rule:
    """The given rule, and None as well."""
    return lambda name, value: None if value is None else rule(name, value)


def shape(name: str, value: Any) -> tuple[int, ...]:
    """The sizes of an array. () is a single value."""
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    sizes = [_whole(size) for size in value] if listed else [None]
    whole_ones = tuple(size for size in sizes if size is not None and size >= 0)
    if len(whole_ones) < len(sizes):
        raise wrong(name, value, "a list of whole numbers, such as (3, 64, 64)")
    return whole_ones


# The rule of each argument, by name. A name means the same in every public call; exceptions are given at the call.
RULES: Mapping[str, Rule] = {
    "batch_size": whole(1),
    "seed": whole(0, 2**64 - 1),
    "epochs": whole(0, MOST_EPOCH, or_none="without end"),
    "epoch": whole(0, MOST_EPOCH),
    "shuffle": one_of(("full", "windowed", None)),
    "window": whole(1),
    "last": one_of(("drop", "keep")),
    "rank": whole(0, or_none="torch.distributed's"),
    "world_size": whole(1, or_none="torch.distributed's"),
    "prefetch": flag,
    "raw": flag,
    "fields": names,
    "soften": real("at least 0 and below 1; 0 leaves the noise as stored", lambda rho: 0 <= rho < 1),
    "device": checked_later,  # checked by Upload, which knows torch's devices
    "filter": checked_later,  # checked by `as_expression`, which knows pyarrow's expressions
    "generation": whole(1, or_none="the newest"),
    "draw": whole(),
    "records": whole(),
    "number": whole(),
    "slots": numbers,
    "rows": numbers,
    "columns": or_none(names),
    "name": text,
    "path": place,
    "root": place,
    "target": place,
    "folder": or_none(place),
    "split": text,
    "layout": text,  # checked by `spec`, which knows the names
    "codec": text,
    "dtype": text,
    "cache": instance("ShardCache", none=True),
    "out": instance("dict", "Mapping", none=True),  # its arrays are checked by `writable`
    "progress": function,
    "threads": whole(1, or_none="as many as there are cores"),
    "state": instance("dict", "Mapping"),
    "classes": names,
    "image_shape": shape,
    "shape": shape,
    "rows_per_shard": whole(1),
    "image_scale": or_none(real("a number above 0", lambda scale: scale > 0)),
    "image_shift": or_none(real("a number", lambda shift: True)),
    "image_decoder": or_none(text),
    "max_bytes": whole(1, or_none="what the disk can give"),
    "file_bytes": whole(1),
}


def checked(*, options: type | None = None, **own: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Applies the rules to the arguments of a call, by name. `own` are rules for this call only.

    `options` is the TypedDict of its `**options`. An unknown option raises TypeError, which suggests the nearest name.
    """
    more: Collection[str] = () if options is None else options.__annotations__

    def decorate(call: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(call)
        parameters = signature.parameters
        rest = next((name for name, one in parameters.items() if one.kind is one.VAR_KEYWORD), None)
        known = [name for name in parameters if name not in ("self", "cls", rest)] + list(more)
        rules = {name: own[name] if name in own else RULES[name] for name in known}
        in_order = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
        needed = {name for name, one in parameters.items() if name != rest and one.default is one.empty}

        @functools.wraps(call)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in rules:
                    raise unknown(call.__name__, name, known)
            given = {**dict(zip(in_order, args)), **kwargs}
            if len(given) < len(args) + len(kwargs) or not needed <= given.keys():
                try:
                    signature.bind(*args, **kwargs)
                except TypeError as error:  # one is missing, there are too many, or one is there twice
                    raise TypeError(f"{call.__qualname__.removesuffix('.__init__')}: {error}") from None
            checked = {name: rules[name](name, value) if name in rules else value for name, value in given.items()}
            return call(**checked)  # type: ignore[call-arg, arg-type]

        wrapper.checked = rules  # type: ignore[attr-defined] # for the test that every argument has a rule
        return wrapper

    return decorate


def unknown(call: str, name: str, known: Collection[str]) -> TypeError:
    """The error for an argument that a call does not have."""
    return TypeError(f"{call} has no argument {name!r}{nearest(name, known)}; it takes {', '.join(known)}")


def writable(name: str, value: Any, shape: tuple[int, ...], dtypes: Sequence[Any]) -> Any:
    """An array of numpy to write into, contiguous, of this shape and of one of these dtypes."""
    import numpy as np

    if not isinstance(value, np.ndarray):
        lacks = f"a {type(value).__name__}"
    elif value.shape != shape or value.dtype not in dtypes:
        lacks = f"{value.dtype} {by(value.shape)}"
    elif not value.flags.c_contiguous:
        lacks = "not contiguous"
    elif not value.flags.writeable:
        lacks = "read-only"
    else:
        return value
    must = f"a contiguous, writable numpy array of {' or '.join(map(str, dtypes))} {by(shape)}"
    raise WrongArgument(name, f"is {lacks}: it must be {must}")


def nearest(value: Any, choices: Iterable[Any]) -> str:
    """What may have been meant, for the end of a message; empty where nothing is near."""
    words = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(value, words, 1) if isinstance(value, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def _whole(value: Any) -> int | None:
    """A whole number, also if a float holds it; None for anything else."""
    try:
        return None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        number = _real(value)
        return int(number) if number.is_integer() else None


def _real(value: Any) -> float:
    """A number as a float; nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
