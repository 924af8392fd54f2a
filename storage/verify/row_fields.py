"""Checks the row-scoped fields of a store against their field.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage.errors import StorageError
from nfm.storage.files.durable import StoredFile
from nfm.storage.ledger.row_fields import FIELD, FIELDS, RowField, row_field_names
from nfm.storage.verify.files import Finding, Level, check_file, finding_of, local_copies

_AGAIN = "restore it from a copy, or remove the field's folder and add the field again"


def check_fields(root: Path, level: Level) -> tuple[set[str], list[Finding]]:
    """(the files that the fields name, relative to the store; everything that is wrong with them)."""
    named: set[str] = set()
    findings: list[Finding] = []
    try:
        names = row_field_names(root)
    except StorageError as error:
        return named, [finding_of("quick", root / FIELDS, error, _AGAIN)]
    for name in names:
        folder = f"{FIELDS}/{name}"
        named.add(f"{folder}/{FIELD}")
        try:
            field = RowField.open(root, name)
        except StorageError as error:
            findings.append(finding_of("quick", root / folder / FIELD, error, _AGAIN))
            continue
        files = [StoredFile(f"{folder}/{part.file}", part.sha256, part.bytes) for part in field.files]
        named |= {file.path for file in files}
        damaged = [finding for file in files if (finding := check_file(root, file, level, _AGAIN))]
        if level != "quick" and not damaged:
            damaged = list(_content_findings(root, field, files, deep=level == "deep"))
        findings += damaged
    return named, findings


def _content_findings(root: Path, field: RowField, files: list[StoredFile], deep: bool) -> Iterator[Finding]:
    """Checks that the files open as field.json says; with `deep` also that numpy reads the same values."""
    start = 0
    for file, part in zip(files, field.files):
        path = str(root / file.path)
        try:
            mapped = field.gather(np.arange(start, start + (part.rows if deep else 1)))
            if deep and not _same(mapped, _stock(root, file)):
                yield Finding("deep", path, "a stock reader finds other values", _AGAIN)
        except StorageError as error:
            yield finding_of("default", root / file.path, error, _AGAIN)
        except Exception as error:  # whatever numpy raises, it is about this file
            yield Finding("deep", path, f"a stock reader fails on it: {error}", _AGAIN)
        start += part.rows


def _stock(root: Path, file: StoredFile) -> Any:
    with local_copies(root, [file]) as (path,):
        return np.load(path, allow_pickle=False)


def _same(mapped: Any, stock: Any) -> bool:
    return stock.dtype == mapped.dtype and np.array_equal(stock, mapped, equal_nan=stock.dtype.kind == "f")
