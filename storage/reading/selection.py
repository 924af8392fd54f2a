"""Subsets of a store, chosen by a filter over its index: by label, draw, nll or any other column."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nfm.storage.errors import CorruptShard, StorageError
from nfm.storage.errors.arguments import WrongArgument, nearest, wrong
from nfm.storage.files.atomic import canonical_json, digest
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import inside, is_remote
from nfm.storage.format.commit import ShardFiles
from nfm.storage.format.index import INDEX_SCHEMA, read_index
from nfm.storage.format.order import Rows

Filter: TypeAlias = pc.Expression | Sequence[Any]  # or conditions, in the form of pyarrow.parquet
_LOCAL_THREADS, _REMOTE_THREADS = 4, 16


@dataclass(frozen=True)
class Selection:
    """The selected slots of each draw, ascending. Draws without selected slots are left out."""

    text: str
    slots: Mapping[int, npt.NDArray[Any]]

    @property
    def draws(self) -> tuple[int, ...]:
        """The draws with selected slots, ascending."""
        return tuple(sorted(self.slots))

    def order_key(self, key: str) -> str:
        """The identity of the order of these records: the same for the same records of the same source."""
        chosen = [[draw, digest(self.slots[draw].astype("<i8").tobytes())] for draw in self.draws]
        return digest(canonical_json({"order_key": key, "selected": chosen}))

    def counts(self, draw: int, rows_per_shard: int) -> Rows:
        """The number of selected records of each shard that has any."""
        counts = np.bincount(self.slots[draw] // rows_per_shard)
        return counts[counts > 0]


def select(root: Path, shards: Mapping[int, Sequence[ShardFiles]], filter: Filter, rows: int) -> Selection:
    """The records of these shards (by draw) that match, from the columns that the filter names.

    Raises ValueError for unknown columns, StorageError if nothing matches.
    """
    expression = as_expression(filter)
    text = " ".join(str(expression).split())
    columns = ["slot", *_columns(expression, text)]
    found: dict[int, npt.NDArray[Any]] = {}
    for draw, entries in shards.items():
        slots = read_parts(root, entries, columns, expression)["slot"].to_numpy()
        if len(slots):
            _check(root, draw, slots, rows)
            found[draw] = slots.astype(np.int32 if rows < 2**31 else np.int64)
    if "nll" in columns and not any(_has_nll(root, entries) for entries in shards.values()):
        said = f"no record of {root} has an nll, which nfm pairs have, and those that a writer gave one"
        raise WrongArgument("filter", f"{text}: {said}; choose by another column")
    if not found:
        raise StorageError(f"{root}: no record matches the filter {text}; `store.index()` shows what there is")
    return Selection(text, found)


def as_expression(filter: Filter) -> pc.Expression:
    """The filter as one expression. Raises ValueError if it is not a filter."""
    if isinstance(filter, pc.Expression):
        return filter
    try:
        if not isinstance(filter, Sequence) or isinstance(filter, str | bytes):
            raise TypeError(filter)
        found = pq.filters_to_expression(filter)
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError, pa.ArrowException) as error:
        raise wrong(
            "filter",
            filter,
            "a pyarrow expression such as pc.field('label') == 3, or a list of conditions such as "
            "[('label', 'in', [1, 2]), ('nll', '<', 2.5)], where `in` takes a list",
        ) from error
    for condition in filter:
        for one in [condition] if isinstance(condition[0], str) else condition:
            _check_choice(*one)
    return found


def _check_choice(column: str, how: str, values: Any) -> None:
    """Raises WrongArgument for values of `in` that pyarrow would turn into others: a text is many letters to it, and
    "1" and True are 1. Also for those that no record can have, none at all, None and NaN.
    """
    if column not in INDEX_SCHEMA.names:
        return
    if how not in ("in", "not in"):
        if values is None or (isinstance(values, float) and math.isnan(values)):
            raise wrong("filter", (column, how, values), "a value to compare with; nothing compares with this one")
        return
    kind = INDEX_SCHEMA.field(column).type
    fits = str if pa.types.is_string(kind) else numbers.Real
    listed = [] if isinstance(values, str | bytes) else list(values)
    if not listed or not all(isinstance(value, fits) and not isinstance(value, bool) for value in listed):
        raise wrong("filter", (column, how, values), f"a list of values of the column, {column} is {kind}")


def read_parts(
    root: Path,
    shards: Sequence[ShardFiles],
    columns: Sequence[str] | None,
    expression: pc.Expression | None = None,
) -> pa.Table:
    """Columns of the index parts of some shards, one after another, or only the matching rows. Read in parallel."""

    def read(shard: ShardFiles) -> pa.Table:
        table = read_index(inside(root, shard.index.path), columns, shard.records, shard.index.sha256)
        return table if expression is None else _matching(table, expression)

    return pa.concat_tables(parallel(read, shards, _REMOTE_THREADS if is_remote(root) else _LOCAL_THREADS))


def _has_nll(root: Path, entries: Sequence[ShardFiles]) -> bool:
    return bool(np.isfinite(read_parts(root, entries, ["nll"])["nll"].to_numpy()).any())


def _columns(expression: pc.Expression, text: str) -> list[str]:
    """The columns that an expression needs: it cannot be bound without them."""
    whole = INDEX_SCHEMA.empty_table()
    try:
        whole.filter(expression)
    except (pa.ArrowException, TypeError) as error:
        columns = ", ".join(f"{column.name} ({column.type})" for column in INDEX_SCHEMA)
        said = f"{text}: {_why(str(error).splitlines()[0], text)}; the index has the columns {columns}"
        raise WrongArgument("filter", said) from error
    return [
        name for name in INDEX_SCHEMA.names if name != "slot" and not _binds(whole.drop_columns([name]), expression)
    ]


def _why(arrow: str, text: str) -> str:
    """What is wrong with an expression, from the sentence that pyarrow has for it."""
    if unknown := re.match(r"No match for FieldRef\.Name\((.*?)\)", arrow):
        return f"there is no column {unknown[1]!r}{nearest(unknown[1], INDEX_SCHEMA.names)}"
    if arrow.startswith("No match for"):
        return "it names a column that is not there"
    if kind := re.search(r"must evaluate to bool.* evaluates to (\S+)", arrow):
        return f"it gives a value ({kind[1]}) where true or false is needed: compare it, as in pc.field('label') == 3"
    named = [
        f"{name} is {INDEX_SCHEMA.field(name).type}" for name in INDEX_SCHEMA.names if re.search(rf"\b{name}\b", text)
    ]
    return f"its values do not fit its columns, {' and '.join(named) or 'of which it names none'} (pyarrow: {arrow})"


def _matching(table: pa.Table, expression: pc.Expression) -> pa.Table:
    try:
        return table.filter(expression)
    except pa.ArrowException as error:  # of its values, such as a division by zero: the types fit
        text, first = " ".join(str(expression).split()), str(error).splitlines()[0]
        raise WrongArgument("filter", f"{text}: it cannot be computed for every record ({first})") from error


def _binds(table: pa.Table, expression: pc.Expression) -> bool:
    try:
        table.filter(expression)
    except pa.ArrowException:
        return False
    return True


def _check(root: Path, draw: int, slots: npt.NDArray[Any], rows: int) -> None:
    if slots[0] < 0 or slots[-1] >= rows or not (np.diff(slots) > 0).all():
        raise CorruptShard(
            f"{root}: the index parts of draw {draw} do not list the slots 0 to {rows - 1} in order; run `nfm audit`"
        )
