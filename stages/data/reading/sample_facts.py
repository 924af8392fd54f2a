"""What a tar's samples say beside the image: a label of `.cls` or `.json`, a caption of `.txt` or `.json`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nfm.stages.base import Reporter, Unfit
from nfm.stages.data.reading.tar_samples import Member
from nfm.storage.errors import is_utf8, legible
from nfm.storage.format import untrusted
from nfm.storage.format.untrusted import shown

Read = Callable[[Member], bytes]
T = TypeVar("T")

SHOWN, MOST_FIELDS = 12, 1000
MOST_BYTES = {"cls": 64, "txt": 1 << 16, "json": 1 << 20}


class UnfitError(ValueError):
    """A sample that cannot be used; its message is the reason."""


class Facts:
    """Labels and captions of samples, one after the other.

    `labels` and `captions` are fields of `.json`; "" for none; by default they are what `.cls` and `.txt` hold. A label
    is a whole number, or a name in `classes`, the first of which has the number `first`.
    """

    def __init__(self, labels: str | None, captions: str | None, classes: Sequence[str] | None, first: int):
        self._from, self._first = {"labels": labels, "captions": captions}, first
        self._numbers = {name: first + place for place, name in enumerate(classes or ())}
        self._labels: list[int | None] = []
        self._captions: list[str | None] = []
        self._problems: dict[int, str] = {}
        self._having: Counter[str] = Counter()  # samples with such a member
        self._read = self._without = 0  # samples with fields in the .json, and without a caption
        self._fields: Counter[str] = Counter()  # samples whose .json has the field

    def add(self, members: Mapping[str, Member], read: Read) -> None:
        """The next sample."""
        self._having.update(kind for kind in MOST_BYTES if kind in members)
        fields = (self._tried(lambda: _json(members, read)) if any(self._from.values()) else None) or {}
        self._read += bool(fields)
        few = len(self._fields) < MOST_FIELDS
        self._fields.update(field for field in fields if few or field in self._from.values())
        label = self._tried(lambda: self._label(members, read, fields))
        caption = self._tried(lambda: (self._caption(members, read, fields),))
        self._without += caption == (None,)
        self._labels.append(label)
        self._captions.append(caption[0] if caption else None)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool(self._from["labels"]) or (self._from["labels"] is None and self._having["cls"] > 0)

    def labels(self) -> np.ndarray | None:
        """The labels as the tars have them, int64 [N], -1 where there is none; None if the images have no labels."""
        return (
            None
            if not self.labelled
            else np.array([-1 if label is None else label for label in self._labels], np.int64)
        )

    def captions(self) -> list[str | None] | None:
        """A caption for each sample, None for one without or set aside; None if no sample has one."""
        found = [None if row in self._problems else caption for row, caption in enumerate(self._captions)]
        return found if any(caption is not None for caption in found) else None

    def problems(self) -> dict[int, str]:
        """Samples that cannot be used, by their number."""
        if not self.labelled:
            return self._problems
        lacking = {row: "no .cls, which others have" for row, label in enumerate(self._labels) if label is None}
        return lacking | self._problems

    def check(self, where: str) -> None:
        """Refuses a setting that names what no sample has."""
        for what, field in self._from.items():
            if not field or self._fields[field] or not self._labels:
                continue
            if not self._having["json"]:
                raise Unfit(f"data.{what} = {field!r} names a field of the .json members, and {where} has none of them")
            if self._read:
                raise Unfit(f"data.{what} = {field!r}: no .json of {where} has that field; {_common(self._fields)}")

    def tell(self, where: str, report: Reporter) -> None:
        """Tells where labels and captions may be, and how many captions are missing."""
        for what, member in (("labels", "cls"), ("captions", "txt")):
            if self._having["json"] and not self._having[member] and self._from[what] is None:
                report.say(
                    f"{where}: no sample has .{member}; data.{what} names a field of the .json members, if one has it"
                )
        if self._without and self.captions() is not None:
            report.say(f"{where}: {self._without:,} of {len(self._captions):,} samples have no caption")

    def _tried(self, read: Callable[[], T]) -> T | None:
        """What is read of the next sample; None if it cannot be, which is a problem of the sample."""
        try:
            return read()
        except UnfitError as error:
            self._problems.setdefault(len(self._labels), legible(str(error)))
            return None

    def _label(self, members: Mapping[str, Member], read: Read, fields: Mapping[str, Any]) -> int | None:
        field = self._from["labels"]
        if field is None and "cls" in members:
            text = _text(members, "cls", read).strip()
            if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
                raise UnfitError(f".cls holds {shown(text)}, no whole number")
            return int(text)
        if not field:
            return None
        value = _field(fields, field)
        if isinstance(value, str) and value in self._numbers:
            return self._numbers[value]
        if type(value) is not int or abs(value) >= 10**18:
            raise UnfitError(
                f"field {field!r} of its .json is {shown(value)}, no whole number and none of data.classes"
            )
        return value

    def _caption(self, members: Mapping[str, Member], read: Read, fields: Mapping[str, Any]) -> str | None:
        field = self._from["captions"]
        if field is None:
            return _text(members, "txt", read) if "txt" in members else None
        value = _field(fields, field) if field else None
        if value is not None and not isinstance(value, str):
            raise UnfitError(f"field {field!r} of its .json is {shown(value)}, no text")
        if value is not None and not is_utf8(value):
            raise UnfitError(f"field {field!r} of its .json has half of a character, which no UTF-8 has")
        return value


def _common(counts: Counter[str]) -> str:
    """The names that most samples have."""
    shown = ", ".join(legible(name[:40]) for name, _ in counts.most_common(SHOWN))
    return f"there are {shown}{', ...' if len(counts) > SHOWN else ''}"


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise UnfitError(f"no field {name!r} in its .json")
    return fields[name]


def _text(members: Mapping[str, Member], kind: str, read: Read) -> str:
    member = members[kind]
    if member.bytes > MOST_BYTES[kind]:
        raise UnfitError(f".{kind} has {member.bytes:,} bytes, more than the {MOST_BYTES[kind]:,} that are read")
    try:
        return read(member).decode()
    except UnicodeDecodeError as error:
        raise UnfitError(f".{kind} is no UTF-8, at byte {error.start}") from error


def _json(members: Mapping[str, Member], read: Read) -> dict[str, Any]:
    if "json" not in members:
        raise UnfitError("no .json, of which data.labels or data.captions names a field")
    try:
        found = untrusted.json_value(_text(members, "json", read))
    except ValueError as error:
        if isinstance(error, UnfitError):
            raise
        raise UnfitError(f".json cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UnfitError(".json has no fields")
    return found
