"""The recipe of a pair store (format 1): its fields, its sizes, and where its pairs came from."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from nfm.storage.errors import NewerSchema, NoPlace, StorageError
from nfm.storage.errors.arguments import unknown
from nfm.storage.files.atomic import create_json, is_temporary, read_json
from nfm.storage.files.paths import as_path, exists, names_in, size_of
from nfm.storage.format import untrusted
from nfm.storage.format.codecs import CODECS
from nfm.storage.format.fields import (
    IMAGE_DTYPES,
    MOST_AXES,
    MOST_RECORD,
    ORIGIN,
    Field,
    check_channels_first,
    pair_fields,
)

FORMAT = 1
SPEC = "spec.json"
DRAFT = "spec.draft.json"  # for a store whose writer does not know its source yet

_MOST_FIELDS = 64
_MOST_ROWS = 10**9  # keys have nine digits
_MOST_SHARDS = 100_000  # names end at shard 99999
_MOST_VALUE = 1e6  # of a value range; float32 ends far above it
_MOST_OPTIONS = 64
# What `StoreSpec.external` takes beside its named arguments; the rest of a recipe follows from those.
_OTHERS = ("noise_step", "image_scale", "image_decoder", "flips", "seed", "eta", "sigma_f", "teacher", "potential",
           "student")  # fmt: skip
# Left out of the JSON if they are None.
_LATER = ("noise_step", "image_scale", "image_shift", "image_decoder", "potential", "student", "coupling_options")


class Sizes(Protocol):
    """What a recipe needs from its layout."""

    def check(self, spec: StoreSpec) -> None:
        """Raises StorageError for sizes that the layout does not allow."""
        ...


_layouts: Mapping[str, Sizes] = {}


def use_layouts(table: Mapping[str, Sizes]) -> None:
    """Registers the layouts. `layouts` imports this file, so it calls this when nfm.storage is imported."""
    global _layouts
    _layouts = table


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What all shards of a store have in common. It is stored in spec.json under the key `store`.

    Raises StorageError for a value of a wrong type or out of range, NewerSchema for a newer format.
    """

    rows: int  # records of one draw
    rows_per_shard: int
    fields: tuple[Field, ...]
    coupling: str
    source: str  # content digest of the data that the images come from
    rows_per_block: int = 256  # records of one tar sample (layout blocks) or of one inner chunk (layout zarr)
    codec: str = "float16"  # of the noise
    noise_step: float | None = None  # noise = noise_step * stored integer; None: the codec's own step, or floats
    value_range: tuple[float, float] = (-1.0, 1.0)  # the values of the uint8 pixels 0 and 255
    image_scale: float | None = None  # float images (latents) are divided by it before `image_decoder`
    image_shift: float | None = None  # and this is added then
    image_decoder: str | None = None  # what turns float images into pictures
    flips: bool = False
    seed: int = 0
    eta: float | None = None
    sigma_f: float | None = None
    teacher: str | None = None  # content digest; so are the next two
    potential: str | None = None
    student: str | None = None  # the student that made the images
    coupling_options: Mapping[str, Any] | None = None  # what else decides the pairs: text, numbers, true and false
    classes: int | None = None
    layout: str = "blocks"
    format: int = FORMAT

    def __post_init__(self) -> None:
        if untrusted.integer("store spec: format", self.format, 1) > FORMAT:
            raise _newer(self.format)
        untrusted.one_of("store spec: layout", self.layout, _layouts)
        untrusted.one_of("store spec: codec", self.codec, CODECS)
        if self.noise_step is None:
            object.__setattr__(self, "noise_step", CODECS[self.codec].step)
        object.__setattr__(self, "fields", tuple(untrusted.sequence("store spec: fields", self.fields, _MOST_FIELDS)))
        self._check_values()
        self._check_fields()
        self._check_sizes()

    @classmethod
    def external(
        cls,
        *,
        rows: int,
        image_shape: tuple[int, ...],
        origin: str,
        image_dtype: str = "uint8",
        classes: int | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        codec: str = "float16",
        layout: str = "blocks",
        rows_per_shard: int = 4096,
        rows_per_block: int = 256,
        source: str = "",
        **others: Any,
    ) -> StoreSpec:
        """The recipe of pairs that were made elsewhere, for `PairWriter`. `origin` says in words where they come from.

        `image_shape` is (C, H, W). `value_range`: for uint8 images the values that 0 and 255 stand for, for
        float images the range that their values must lie in. `classes=None` means that there are no labels. `source` is
        a content digest of the images; without it the writer computes one. Also taken: noise_step, image_scale,
        image_decoder, flips, seed, eta, sigma_f, teacher, potential and student, see `StoreSpec`. Raises StorageError
        for an invalid value and names the argument.
        """
        for name in others:
            if name not in _OTHERS:
                named = [*inspect.signature(cls.external).parameters][:-1]
                raise unknown("StoreSpec.external", name, [*named, *_OTHERS])
        if not isinstance(origin, str) or not origin.strip():
            raise StorageError(
                f"store spec: origin {untrusted.shown(origin)}; say in words who made the pairs, and how"
            )
        untrusted.one_of("store spec: codec", codec, CODECS)
        if CODECS[codec].made:
            raise StorageError(
                f"store spec: codec {codec}: noise that was made elsewhere is no function of a seed here; take "
                f"{', '.join(name for name, kind in CODECS.items() if not kind.made)}"
            )
        check_channels_first("store spec", untrusted.sequence("store spec: image_shape", image_shape, MOST_AXES))
        if classes == 0:
            raise StorageError("store spec: classes 0: leave classes out where images have no labels")
        return cls(
            rows=rows,
            rows_per_shard=rows_per_shard,
            rows_per_block=rows_per_block,
            fields=pair_fields(image_shape, codec, image_dtype, label=classes is not None),
            coupling="external",
            coupling_options={"origin": origin},
            source=source,
            codec=codec,
            layout=layout,
            value_range=value_range,
            classes=classes,
            **others,
        )

    def with_source(self, source: str) -> StoreSpec:
        """The same recipe for the data with this content digest."""
        return dataclasses.replace(self, source=source)

    @cached_property
    def stored(self) -> tuple[Field, ...]:
        """The fields that lie in shards: those of a pair, but where noise comes from in place of noise that is made."""
        if not CODECS[self.codec].made:
            return self.fields
        origin = Field(ORIGIN, "int64", (3,), "origin")
        return tuple(origin if field.role == "noise" else field for field in self.fields)

    def field(self, name: str) -> Field:
        """The field called `name`. Raises StorageError if the store has no such field."""
        for field in self.fields:
            if field.name == name:
                return field
        raise StorageError(f"store spec: no field {name!r}, only {', '.join(f.name for f in self.fields)}")

    def has(self, name: str) -> bool:
        """Whether the store has a field called `name`."""
        return any(field.name == name for field in self.fields)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image, usually (C, H, W)."""
        return self.field("image").shape

    @property
    def shards_per_draw(self) -> int:
        """The number of shards of one draw. The last one may be short."""
        return -(-self.rows // self.rows_per_shard)

    def slots_of(self, shard: int) -> range:
        """The slots of shard number `shard` in any draw, in the order of its records."""
        if not 0 <= shard < self.shards_per_draw:
            raise StorageError(f"shard {shard}: a draw here has shards 0 to {self.shards_per_draw - 1}")
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The recipe in JSON's types."""
        recipe = dataclasses.asdict(self) | {
            "fields": [dataclasses.asdict(field) | {"shape": list(field.shape)} for field in self.fields],
            "value_range": list(self.value_range),
        }
        return {key: value for key, value in recipe.items() if key not in _LATER or value is not None}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> StoreSpec:
        """The recipe from the result of `to_dict` or from a whole spec.json. Unknown keys are ignored."""
        recipe = body["store"] if isinstance(body.get("store"), Mapping) else body
        found = untrusted.integer("store spec: format", recipe.get("format", FORMAT), 1)
        if found > FORMAT:
            raise _newer(found)
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in recipe.items() if key in known}
        try:
            listed = untrusted.sequence("store spec: fields", recipe["fields"], _MOST_FIELDS)
            entries = [untrusted.mapping("store spec: a field", entry) for entry in listed]
            values["fields"] = tuple(Field(f["name"], f["dtype"], f["shape"], f["role"]) for f in entries)
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise StorageError(f"store spec: incomplete or of another kind ({error}); is it a pair store?") from error

    def _check_values(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("rows", "rows_per_shard", "rows_per_block"):
            keep(name, untrusted.integer(f"store spec: {name}", getattr(self, name), 1, _MOST_ROWS))
        keep("seed", untrusted.integer("store spec: seed", self.seed, 0, 2**64 - 1))
        for name in ("coupling", "source"):
            untrusted.text(f"store spec: {name}", getattr(self, name))
        untrusted.truth("store spec: flips", self.flips)
        for name in ("noise_step", "image_scale", "image_shift", "eta", "sigma_f"):
            if getattr(self, name) is not None:
                keep(name, untrusted.real(f"store spec: {name}", getattr(self, name)))
        for name in ("eta", "sigma_f", "noise_step"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise StorageError(f"store spec: {name} {getattr(self, name)}: give 0 or more, it is a scale of noise")
        for name in ("teacher", "potential", "student", "image_decoder"):
            if getattr(self, name) is not None:
                untrusted.text(f"store spec: {name}", getattr(self, name))
        if self.coupling_options is not None:
            keep("coupling_options", _options(self.coupling_options))
        if self.classes is not None:
            keep("classes", untrusted.integer("store spec: classes", self.classes))
        ends = untrusted.sequence("store spec: value_range", self.value_range, 2)
        keep("value_range", tuple(untrusted.real("store spec: value_range", end) for end in ends))
        if len(ends) != 2 or not -_MOST_VALUE <= self.value_range[0] < self.value_range[1] <= _MOST_VALUE:
            raise StorageError(f"store spec: value_range {self.value_range}: give the lowest value, then the highest")

    def _check_fields(self) -> None:
        names = [field.name for field in self.stored]
        if len(set(names)) < len(names):
            raise StorageError(f"store spec: a field is listed twice in {names}")
        for role in ("image", "noise", "slot"):
            if self.field(role).role != role:
                raise StorageError(f"store spec: the field {role!r} has the role {self.field(role).role!r}")
        codec = CODECS[self.codec]
        if self.field("noise").dtype != codec.dtype:
            raise StorageError(
                f"store spec: the noise field is {self.field('noise').dtype} but the codec is {self.codec}; "
                "make the fields with pair_fields(shape, codec)"
            )
        if (self.noise_step is None) != (codec.step is None) or not 1e-6 < (self.noise_step or 1.0) < 1e3:
            raise StorageError(f"store spec: noise_step {self.noise_step} with codec {self.codec}; leave it out")
        untrusted.one_of("store spec: the image's dtype", self.field("image").dtype, IMAGE_DTYPES)
        if self.image_scale is not None and (self.field("image").dtype == "uint8" or self.image_scale <= 0):
            raise StorageError(f"store spec: image_scale {self.image_scale}: above 0, and for float images only")
        for name in ("label", "slot"):
            if self.has(name) and (self.field(name).dtype, self.field(name).shape) != ("int64", ()):
                raise StorageError(f"store spec: the field {name!r} must be one int64 a record")

    def _check_sizes(self) -> None:
        if self.shards_per_draw > _MOST_SHARDS:
            raise StorageError(
                f"store spec: {self.shards_per_draw} shards a draw, {_MOST_SHARDS} at most; raise rows_per_shard"
            )
        record = sum(field.bytes_per_record for field in self.fields)
        if record > MOST_RECORD:
            raise StorageError(f"store spec: {record} bytes a record, {MOST_RECORD} at most")
        _layouts[self.layout].check(self)


def _options(given: Any) -> dict[str, Any]:
    """The options of the coupling; each must be a single JSON value."""
    where = "store spec: coupling_options"
    options = dict(untrusted.mapping(where, given))
    if len(options) > _MOST_OPTIONS:
        raise StorageError(f"{where}: {len(options)} of them, {_MOST_OPTIONS} at most")
    for name, value in options.items():
        untrusted.text(f"{where}: a name", name)
        if isinstance(value, str):
            untrusted.text(f"{where}: {name}", value)
        elif not isinstance(value, bool):
            untrusted.real(f"{where}: {name}", value)
    return options


def check_format(path: Path, body: Mapping[str, Any]) -> None:
    """Refuses a file of a newer format. Raises NewerSchema, or StorageError if the format is not a number."""
    if untrusted.integer(f"{path}: format", body.get("format", FORMAT)) > FORMAT:
        raise NewerSchema(f"{path}: format {body['format']}, this nfm-pairs reads up to {FORMAT}; install a newer one")


def _newer(found: int) -> NewerSchema:
    return NewerSchema(f"store spec: format {found}, this nfm-pairs reads up to {FORMAT}; install a newer nfm-pairs")


def read_spec(root: str | Path) -> StoreSpec:
    """The recipe of the store at `root`. Raises StorageError (no store there) or NewerSchema."""
    path = as_path(root) / SPEC
    if size_of(as_path(root)) is not None:
        raise NoPlace(str(root), "a file that is no manifest of a store; name the folder of the store")
    if not exists(path) and exists(as_path(root) / DRAFT):
        raise StorageError(
            f"{root}: a store that a PairWriter has begun and not sealed; run the code that writes it again, and it "
            "goes on"
        )
    try:
        return StoreSpec.from_dict(read_json(path))
    except StorageError as error:
        if not exists(path):
            raise NoPlace(str(root), "no pair store, it has no spec.json; name the folder of one") from error
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from error


def check_folder(root: Path, order: str) -> None:
    """Refuses a file, and a folder that has something else in it; `order` says what to do with a new one."""
    if str(root).startswith(("http://", "https://")):
        raise NoPlace(
            str(root), f"http is read and not written; {order} a folder or a bucket, such as s3://bucket/store"
        )
    if size_of(root) is not None:
        raise NoPlace(str(root), f"a file, and a store is a folder; {order} a new or empty folder")
    names = [name for name in names_in(root) if not is_temporary(name)]
    if names and SPEC not in names and DRAFT not in names:
        raise NoPlace(str(root), f"there is something else already ({names[0]}); {order} a new or empty folder")


def write_spec(root: str | Path, spec: StoreSpec) -> None:
    """Makes `root` a store of `spec`, without the pipeline. Raises StorageError if it has another recipe."""
    path = as_path(root) / SPEC
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
