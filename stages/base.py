"""What all stages share: the config section, the reporter for progress, and the result.

A stage is a function `run(config, inputs, out, report) -> Result`. It knows neither the graph nor the manifest. The
pipeline gives it the folders of its inputs and an output folder with `spec.json`, and writes the manifest after `run`
returns. If an earlier run was killed, `run` continues from what is in the output folder.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from nfm.storage.errors import NoPlace, Told, WrongUse, is_utf8
from nfm.storage.errors.masked import holds_secret
from nfm.storage.files.paths import as_path, is_remote, local_path

Inputs = Mapping[str, Path]


class StageError(Told):
    """A stage cannot be done. The message names the file or field, the value and the remedy."""


class Unfit(StageError, WrongUse):  # noqa: N818 - it reads as what it says
    """A setting that does not fit the data, the stage or other settings."""


class Stopped(Exception):  # noqa: N818 - not an error: the work is kept and the next run continues it
    """The user asked to stop; everything needed to resume is on disk."""


def operational(default: Any, **constraints: Any) -> Any:
    """A config field about how or where work is done, never about its result. It is left out of the fingerprint."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def _local(text: str) -> str:
    try:
        return str(local_path(text))
    except NoPlace as error:
        raise ValueError(error.reason) from None


LocalField = Annotated[str, AfterValidator(_local)]  # a config field for a path of this machine


def _place(text: str) -> str:
    try:
        return text if is_remote(path := as_path(text)) else str(path)
    except NoPlace as error:
        raise ValueError(error.reason) from None


PlaceField = Annotated[str, AfterValidator(_place)]  # a config field for a path or a URL


Guidance = Annotated[float, Field(ge=-100, le=100)]  # outside this range, images are noise or overflow


def one_of(table: Mapping[str, Any]) -> BeforeValidator:
    """A config field that holds a name of `table`. The table is read when the config is."""

    def known(name: Any) -> str:
        if isinstance(name, str) and name in table:
            return name
        *others, last = map(repr, table)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}" if others else last})

    return BeforeValidator(known)


def named_once(values: Sequence[Any], remedy: str = "name each once") -> None:
    """Raises ValueError for values that a list of a config has more than once."""
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ValueError(f"{', '.join(map(repr, twice))} is named more than once; {remedy}")


def call(function: str, *arguments: Any, **options: Any) -> Any:
    """The result of a function named as `module:function`. It is imported here, because the module may import torch."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments, **options)


def added(default: Any, **constraints: Any) -> Any:
    """A config field that was added later. At its default it is left out of the fingerprint, so old ones stay valid."""
    return Field(default, json_schema_extra={"added": True}, **constraints)


class Section(BaseModel):
    """One table of the config file. Unknown keys and numbers that no field allows are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses true and false as numbers, and whole numbers beyond the 64 bits of TOML."""
        parts = list(_parts(value))
        kinds = _types(cls.model_fields[str(info.field_name)])
        if any(type(part) is bool for part in parts) and not {bool, JsonValue} & kinds:
            raise ValueError("true and false are no value of this field")
        if any(type(part) is int and not -(2**63) <= part < 2**63 for part in parts):
            raise ValueError("a whole number has at most 64 bits; use a smaller one")
        if JsonValue in kinds and any(type(part) is float and not math.isfinite(part) for part in parts):
            raise ValueError("nan and inf are no finite numbers; put a text in quotation marks")
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
        """The fields that change the result of the stage; they go into the fingerprint."""
        values = self.model_dump(mode="json")
        for name, info in type(self).model_fields.items():
            marks = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            if marks.get("operational") or (marks.get("added") and getattr(self, name) == info.default):
                del values[name]
        return values


def _parts(value: Any) -> Iterator[Any]:
    """The value and all values inside it."""
    yield value
    if isinstance(value, dict):
        value = list(value.values())
    for part in value if isinstance(value, list | tuple) else ():
        yield from _parts(part)


def _types(field: FieldInfo) -> set[Any]:
    """The types that a field may hold, also nested."""
    found, left = set(), [field.annotation]
    while left:
        kind = left.pop()
        found.add(kind)
        left += get_args(kind)
    return found


class Reporter(Protocol):
    """Receives what a stage reports: progress for the user, and lines for the event log."""

    @property
    def stopping(self) -> bool:
        """True if the user asked to stop. The stage then saves and raises `Stopped`."""
        ...

    @property
    def ending(self) -> bool:
        """True if no new unit of work may begin; units in progress are finished. Also true if `stopping`."""
        ...

    def check_lock(self) -> None:
        """Raises if another process has taken over the artifact. Call it before replacing a file."""
        ...

    def progress(
        self, done: int, total: int, unit: str, workers: Sequence[Mapping[str, Any]] = (), **figures: Any
    ) -> None:
        """`done` of `total` units, with a row for each worker (see `executors.tally`) and any other figures."""
        ...

    def say(self, text: str) -> None: ...

    def log(self, kind: str, **values: Any) -> None: ...


@dataclass(frozen=True)
class Result:
    """What a stage returns to the pipeline for the manifest.

    The SHA-256 of the files in `payload`, in order, make the content digest. `files` are listed as well. `digests`
    holds (sha256, bytes) of files that were hashed while they were written. `extra` goes to the top level of the
    manifest. `content_digest` replaces the digest over `payload` if the stage's store has its own.
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
    """One fault that an audit found, with its file and the remedy."""

    file: str
    problem: str
    remedy: str
