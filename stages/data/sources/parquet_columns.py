"""Which columns of a Parquet file are the images, the labels and the captions, and what the classes are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from nfm.stages.base import StageError, Unfit
from nfm.storage.errors import legible
from nfm.storage.format import untrusted

IMAGES, LABELS, CAPTIONS = ("image", "img"), ("label", "labels"), ("caption", "text")
ENCODED = "the bytes of encoded images (PNG, JPEG), one a row, or a struct of bytes and path"
NO_LABELS = 'data.labels = "" for images without labels'


class Columns(NamedTuple):
    """The columns of a file by name; labels and captions are "" if there are none. `texts` may be captions."""

    images: str
    labels: str
    captions: str
    names: tuple[str, ...] | None  # of the classes
    texts: tuple[str, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all files must have in common."""
        return self[:4]

    def told(self, other: Columns) -> str:
        """What it holds, with the first class that has another name than in `other`."""
        said = f"images in {self.images!r}, labels in {self.labels or 'no column'!r}"
        if self.names is None:
            return said
        said += f" of {len(self.names)} named classes"
        pairs = enumerate(zip(self.names, other.names or ()))
        differs = next((place for place, (mine, others) in pairs if mine != others), None)
        return said if differs is None else f"{said}, class {differs} is {legible(self.names[differs])!r}"


def columns_of(file: Path, schema: pa.Schema, images: str | None, labels: str | None, captions: str | None) -> Columns:
    """The columns by the settings, else by the names and types that Hugging Face's data sets have.

    Raises Unfit if a column is not there, of another type, or could be one of several.
    """
    features = _features(file, schema)
    image = _image(file, schema, images)
    label = _label(file, schema, features, labels)
    caption = _named(file, schema, "captions", captions) if captions else ""
    if caption and not _is_text(schema.field(caption).type):
        raise Unfit(f"{file}: column {caption!r}, which data.captions names, is {schema.field(caption).type}, no text")
    texts = tuple(name for name in CAPTIONS if name in schema.names and _is_text(schema.field(name).type))
    return Columns(image, label, caption, _class_names(file, label, features.get(label)), texts)


def _image(file: Path, schema: pa.Schema, given: str | None) -> str:
    if given is None:
        found = [name for name in IMAGES if name in schema.names]
        found = found or [field.name for field in schema if _content(field.type) is not None]
        if len(found) != 1:
            what = f"{len(found)} columns may be the images" if found else "no column of images"
            may_be = found or [field.name for field in schema if _is_bytes(field.type)]
            remedy = f"set data.images to one of {', '.join(may_be)}" if may_be else f"save {ENCODED}"
            raise Unfit(f"{file}: {what}; it holds {_told(schema)}: {remedy}")
        given = found[0]
    name = _named(file, schema, "images", given)
    kind = schema.field(name).type
    kind = getattr(kind, "storage_type", kind)
    content = kind if not pa.types.is_struct(kind) else _content(kind)
    if content is not None and _is_bytes(content):
        return name
    where = f"{file}: column {name!r} is {kind}"
    if pa.types.is_nested(kind) and not pa.types.is_struct(kind):
        inner = getattr(kind, "value_type", pa.null())
        if _is_bytes(inner) or _content(inner) is not None:
            raise Unfit(f"{where}: several images in a row: save one a row")
        raise Unfit(
            f"{where}: pixels as lists, which lose their type and size; save the images as PNG bytes, or as one uint8 "
            'array for data.source = "npz"'
        )
    if _is_text(kind):
        raise Unfit(f"{where}: paths or links, not images: put the bytes of the images into the file")
    raise Unfit(f"{where}, expected {ENCODED}")


def _content(kind: pa.DataType) -> pa.DataType | None:
    """The type of the bytes in a struct of Hugging Face's Image feature; None if it is no such struct."""
    if pa.types.is_struct(kind) and (at := kind.get_field_index("bytes")) >= 0 and _is_bytes(kind.field(at).type):
        return kind.field(at).type
    return None


def _label(file: Path, schema: pa.Schema, features: dict[str, Any], given: str | None) -> str:
    if given == "":
        return ""
    if given is None:
        found = [name for name in schema.names if _is_class_label(features.get(name))]
        found = found or [name for name in LABELS if name in schema.names]
        doubtful = found if len(found) > 1 else [] if found else [one.name for one in schema if _like_labels(one)]
        if doubtful:
            raise Unfit(f"{file}: {', '.join(doubtful)} may be the labels: set data.labels to one, or {NO_LABELS}")
        if not found:
            return ""
        given = found[0]
    name = _named(file, schema, "labels", given)
    if not pa.types.is_integer(schema.field(name).type):
        raise Unfit(
            f"{file}: column {name!r} is {schema.field(name).type}, expected whole numbers: save the number of each "
            f"class, or set {NO_LABELS}"
        )
    return name


def _class_names(file: Path, label: str, feature: Any) -> tuple[str, ...] | None:
    if not label or not _is_class_label(feature) or feature.get("names") is None:
        return None
    names = feature["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise StageError(f"{file}: the names of the classes of {label!r} in its schema are no texts: save it anew")
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise StageError(
            f"{file}: two classes of {label!r} have the name {legible(twice)!r} in its schema: save it anew"
        )
    return tuple(names)


def _features(file: Path, schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's `datasets` wrote about the columns; {} if another program wrote the file."""
    if (text := (schema.metadata or {}).get(b"huggingface")) is None:
        return {}
    try:
        found = untrusted.json_value(text)["info"]["features"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{file}: its schema's entry huggingface cannot be read ({error!r}): save it anew") from error
    return found if isinstance(found, dict) else {}


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _like_labels(field: pa.Field) -> bool:
    """Whether a column may be labels under another name. pandas keeps its index as a column."""
    return (pa.types.is_integer(field.type) or pa.types.is_dictionary(field.type)) and not field.name.startswith(
        "__index_level_"
    )


def _named(file: Path, schema: pa.Schema, setting: str, name: str) -> str:
    if schema.names.count(name) != 1:
        many = "no column" if name not in schema.names else "two columns"
        raise Unfit(f"{file}: {many} {name!r}, which data.{setting} names; it holds {_told(schema)}")
    return name


def _told(schema: pa.Schema) -> str:
    shown: Sequence[str] = [f"{field.name} ({str(field.type)[:60]})" for field in list(schema)[:8]]
    return legible(", ".join(shown)) or "no column"


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
