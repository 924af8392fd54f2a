"""What every stage shares: its config section, the reporter it speaks to, and the result it returns.

A stage is a function `run(config, inputs, out, report) -> Result`. It knows neither the graph nor the manifest:
the pipeline gives it the folders of its inputs and an output folder that holds `spec.json`, and publishes the
manifest after it returned. `run` resumes from whatever an earlier, killed run left in the output folder.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from nfm.storage.errors import NoPlace, Told, WrongUse, is_utf8
from nfm.storage.errors.masked import holds_secret
from nfm.storage.files.paths import local_path

Inputs = Mapping[str, Path]


class StageError(Told):
    """A stage cannot be done; the message names the file or field, the value and the remedy."""


class Unfit(StageError, WrongUse):  # noqa: N818 - it reads as what it says
    """What a config or an option says does not fit its data, its stage or the rest of it."""


class Stopped(Exception):  # noqa: N818 - it is no error: the work is kept and the next run goes on from it
    """The user asked to stop; everything needed to resume is on disk."""


def operational(default: Any, **constraints: Any) -> Any:
    """A config field that decides how or where work is done, never its result: left out of the fingerprint."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def _local(text: str) -> str:
    try:
        return str(local_path(text))
    except NoPlace as error:
        raise ValueError(error.reason) from None


LocalField = Annotated[str, AfterValidator(_local)]  # a config field that names a path of this machine


Guidance = Annotated[float, Field(ge=-100, le=100)]  # beyond, images are noise or overflow


def one_of(table: Mapping[str, Any]) -> BeforeValidator:
    """A config field that holds a name of `table`, whatever the table has when the config is read."""

    def known(name: Any) -> str:
        if isinstance(name, str) and name in table:
            return name
        *others, last = map(repr, table)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}" if others else last})

    return BeforeValidator(known)


def call(function: str, *arguments: Any, **options: Any) -> Any:
    """What the function gives that is named as `module:function`, imported now: tables name what imports torch."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments, **options)


def added(default: Any, **constraints: Any) -> Any:
    """A config field newer than its section: left out of the fingerprint at its default, so old ones stand."""
    return Field(default, json_schema_extra={"added": True}, **constraints)


class Section(BaseModel):
    """One table of the config file; unknown keys are errors, and so are numbers that no field could mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Where numbers are meant, true and false are not 1 and 0; a whole number has TOML's 64 bits."""
        parts = list(_parts(value))
        if any(type(part) is bool for part in parts) and bool not in _types(cls.model_fields[str(info.field_name)]):
            raise ValueError("true and false are no value of this field")
        if any(type(part) is int and not -(2**63) <= part < 2**63 for part in parts):
            raise ValueError("a whole number has at most 64 bits; use a smaller one")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _without_secrets(cls, value: Any) -> Any:
        if holds_secret(value):
            raise ValueError(
                "a URL with a key, a password or a token, which would stand in manifests and logs; leave it out"
            )
        return value

    @field_validator("*")
    @classmethod
    def _in_utf8(cls, value: Any) -> Any:
        if not is_utf8(json.dumps(value, ensure_ascii=False, default=str)):
            raise ValueError(
                "its bytes are no UTF-8, and it would stand in manifests, which are: rename it, or, of a path, run the "
                "command in that folder and name what is below it"
            )
        return value

    def semantic(self) -> dict[str, Any]:
        """The fields that change the stage's result, as the fingerprint sees them."""
        values = self.model_dump(mode="json")
        for name, info in type(self).model_fields.items():
            marks = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            if marks.get("operational") or (marks.get("added") and getattr(self, name) == info.default):
                del values[name]
        return values


def _parts(value: Any) -> Iterator[Any]:
    """The value, and whatever it holds."""
    yield value
    if isinstance(value, dict):
        value = list(value.values())
    for part in value if isinstance(value, list | tuple) else ():
        yield from _parts(part)


def _types(field: FieldInfo) -> set[Any]:
    """The types that a field may hold somewhere."""
    found, left = set(), [field.annotation]
    while left:
        kind = left.pop()
        found.add(kind)
        left += get_args(kind)
    return found


class Reporter(Protocol):
    """Where a stage says what it does: progress for people, lines in events for the record."""

    @property
    def stopping(self) -> bool:
        """True once the user asked to stop; a stage then saves and raises `Stopped`."""
        ...

    @property
    def ending(self) -> bool:
        """True once no new unit of work is to begin, though those in hand are finished; also when `stopping`."""
        ...

    def check_lock(self) -> None:
        """Raises when another process took the artifact over; to be asked before a file is replaced."""
        ...

    def progress(
        self, done: int, total: int, unit: str, workers: Sequence[Mapping[str, Any]] = (), **figures: Any
    ) -> None:
        """`done` of `total` units, with a row for each worker (see `executors.tally`) and any further figures."""
        ...

    def say(self, text: str) -> None: ...

    def log(self, kind: str, **values: Any) -> None: ...


@dataclass(frozen=True)
class Result:
    """What a stage hands to the pipeline for the manifest.

    `payload` are the files, in order, whose SHA-256 make the content digest; `files` are listed beside them;
    `digests` holds (sha256, bytes) of files that were hashed while they were written; `extra` goes to the top
    level of the manifest. `content_digest` overrides the digest over `payload` where the stage's store has its own.
    """

    payload: Sequence[str]
    metrics: dict[str, Any]
    files: Sequence[str] = ()
    digests: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    content_digest: str | None = None
    manifest: str = "manifest.json"


@dataclass(frozen=True)
class Finding:
    """One thing that an audit found wrong, with the file that it concerns and the remedy."""

    file: str
    problem: str
    remedy: str
