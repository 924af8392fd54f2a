"""The recipe of a pair store (format 1): its fields, its sizes, and where its pairs came from."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage.atomic import create_json, read_json
from nfm.storage.errors import NewerSchema, StorageError

FORMAT = 1
ROLES = ("image", "noise", "label", "slot")
CODECS = ("float32", "float16")
SPEC = "spec.json"


@dataclass(frozen=True)
class Field:
    """One array of a record: `shape` and `dtype` (numpy's name) of a single record, and what it is for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise StorageError(f"field {self.name!r}: a name is lower case letters, digits and underscores")
        if self.role not in ROLES:
            raise StorageError(f"field {self.name!r}: role {self.role!r} is none of {', '.join(ROLES)}")
        try:
            kind = np.dtype(self.dtype).kind
        except TypeError as error:
            raise StorageError(f"field {self.name!r}: {self.dtype!r} is no numpy dtype") from error
        if kind not in "biuf":
            raise StorageError(f"field {self.name!r}: dtype {self.dtype!r} is no number; store numbers only")

    @property
    def bytes_per_record(self) -> int:
        """Bytes of one record of this field, headers left out."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def pair_fields(
    image_shape: tuple[int, ...], codec: str = "float16", image_dtype: str = "uint8", label: bool = True
) -> tuple[Field, ...]:
    """The fields of a pair store, in their order: image, noise, label, slot."""
    fields = [Field("image", image_dtype, image_shape, "image"), Field("noise", codec, image_shape, "noise")]
    if label:
        fields.append(Field("label", "int64", (), "label"))
    return (*fields, Field("slot", "int64", (), "slot"))


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What every shard of a store has in common. Lives in spec.json under the key `store`."""

    rows: int  # records of one draw
    rows_per_shard: int
    fields: tuple[Field, ...]
    coupling: str
    source: str  # content digest of the data the images come from
    rows_per_block: int = 256  # records of one tar sample
    codec: str = "float16"  # dtype of the stored noise
    value_range: tuple[float, float] = (-1.0, 1.0)  # what the uint8 images 0 and 255 stand for
    flips: bool = False
    seed: int = 0
    eta: float | None = None
    sigma_f: float | None = None
    teacher: str | None = None  # content digest
    classes: int | None = None
    layout: str = "blocks"
    format: int = FORMAT

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "value_range", tuple(float(value) for value in self.value_range))
        if self.format > FORMAT:
            raise _newer(self.format)
        for name in ("rows", "rows_per_shard", "rows_per_block"):
            if getattr(self, name) < 1:
                raise StorageError(f"store spec: {name} = {getattr(self, name)}, must be at least 1")
        if self.layout != "blocks":
            raise StorageError(f"store spec: layout {self.layout!r} is not known here, only 'blocks'")
        if self.codec not in CODECS:
            raise StorageError(f"store spec: codec {self.codec!r} is none of {', '.join(CODECS)}")
        names = [field.name for field in self.fields]
        if len(set(names)) < len(names):
            raise StorageError(f"store spec: a field is listed twice in {names}")
        for role in ("image", "noise", "slot"):
            self.field(role)
        if self.field("noise").dtype != self.codec:
            raise StorageError(
                f"store spec: the noise field is {self.field('noise').dtype} but the codec is {self.codec}; "
                "make the fields with pair_fields(shape, codec)"
            )

    def field(self, name: str) -> Field:
        """The field called `name`. Raises StorageError when the store has none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise StorageError(f"store spec: no field {name!r}, only {', '.join(f.name for f in self.fields)}")

    def has(self, name: str) -> bool:
        """Whether the store has a field called `name`."""
        return any(field.name == name for field in self.fields)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, usually (C, H, W)."""
        return self.field("image").shape

    @property
    def shards_per_draw(self) -> int:
        """Number of shards of one draw; the last may be short."""
        return -(-self.rows // self.rows_per_shard)

    def slots_of(self, shard: int) -> range:
        """The slots that shard number `shard` of any draw holds, in the order of its records."""
        if not 0 <= shard < self.shards_per_draw:
            raise StorageError(f"shard {shard}: a draw here has shards 0 to {self.shards_per_draw - 1}")
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The recipe in JSON's types."""
        return dataclasses.asdict(self) | {
            "fields": [dataclasses.asdict(field) | {"shape": list(field.shape)} for field in self.fields],
            "value_range": list(self.value_range),
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> StoreSpec:
        """The recipe from `to_dict`'s result or from a whole spec.json; unknown keys are ignored."""
        recipe = body["store"] if isinstance(body.get("store"), Mapping) else body
        found = int(recipe.get("format", FORMAT))
        if found > FORMAT:
            raise _newer(found)
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in recipe.items() if key in known}
        try:
            values["fields"] = tuple(
                Field(f["name"], f["dtype"], tuple(f["shape"]), f["role"]) for f in recipe["fields"]
            )
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise StorageError(f"store spec: incomplete or of another kind ({error}); is it a pair store?") from error


def _newer(found: int) -> NewerSchema:
    return NewerSchema(f"store spec: format {found}, this nfm-pairs reads up to {FORMAT}; install a newer nfm-pairs")


def read_spec(root: str | Path) -> StoreSpec:
    """The recipe of the store at `root`. Raises StorageError (no store there) or NewerSchema."""
    path = Path(root) / SPEC
    try:
        return StoreSpec.from_dict(read_json(path))
    except StorageError as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from error


def write_spec(root: str | Path, spec: StoreSpec) -> None:
    """Makes `root` a store of `spec`, without the pipeline. Raises StorageError if it has another recipe."""
    path = Path(root) / SPEC
    if not create_json(path, {"store": spec.to_dict()}) and read_spec(root) != spec:
        raise StorageError(f"{path}: the store there has another recipe; choose another folder")


def shard_name(draw: int, shard: int) -> str:
    """The name of a shard, of fixed width: d000-s00012."""
    if not (0 <= draw < 1000 and 0 <= shard < 100_000):
        raise StorageError(f"draw {draw}, shard {shard}: names end at draw 999 and shard 99999; use larger shards")
    return f"d{draw:03d}-s{shard:05d}"


def parse_name(name: str) -> tuple[int, int]:
    """(draw, shard) of a shard's name. Raises StorageError for anything else."""
    match = re.fullmatch(r"d(\d{3})-s(\d{5})", name)
    if match is None:
        raise StorageError(f"{name!r} is no shard name; they look like d000-s00012")
    return int(match[1]), int(match[2])
