"""The zarr.json files of a store in layout `zarr`. They depend only on its recipe, so they can be checked."""

from __future__ import annotations

import json
from typing import Any

from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec

_CRC = {"name": "crc32c"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def documents(spec: StoreSpec, draws: int) -> dict[str, bytes]:
    """Every zarr.json of a store of `draws` draws, by its path relative to the store.

    Each draw is a group, which has one array for each field: [rows, *shape]. One store shard is one Zarr shard. The
    attributes of the root hold the recipe; those of the arrays say what their numbers mean.
    """
    found = {"zarr.json": _rendered(_group({"nfm": spec.to_dict()}))}
    for draw in range(draws):
        found[f"d{draw:03d}/zarr.json"] = _rendered(_group({"draw": draw}))
        for field in spec.stored:
            found[f"d{draw:03d}/{field.name}/zarr.json"] = _rendered(_array(spec, field))
    return found


def chunk_path(field: Field, draw: int, shard: int) -> str:
    """Where a sealed store has the file of one field of one shard: d000/noise/c/12/0/0/0."""
    return f"d{draw:03d}/{field.name}/c/{shard}" + "/0" * len(field.shape)


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array(spec: StoreSpec, field: Field) -> dict[str, Any]:
    sharding = {
        "chunk_shape": [spec.rows_per_block, *field.shape],
        "codecs": [_bytes(field), _CRC],
        "index_codecs": [_BYTES, _CRC],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [spec.rows, *field.shape],
        "data_type": field.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [spec.rows_per_shard, *field.shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if field.dtype == "bool" else 0.0 if field.dtype.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": _meaning(spec, field),
        "storage_transformers": [],
    }


def _bytes(field: Field) -> dict[str, Any]:
    return {"name": "bytes"} if field.dtype in ("bool", "int8", "uint8") else _BYTES


def _meaning(spec: StoreSpec, field: Field) -> dict[str, Any]:
    """What the numbers of a field mean."""
    facts: dict[str, Any] = {"role": field.role}
    if field.role == "noise":
        facts |= {"codec": spec.codec, "noise_step": spec.noise_step}  # noise = noise_step * stored
    elif field.role == "origin":
        facts |= {"codec": spec.codec, "seed": spec.seed}  # the noise is made from these
    elif field.role == "image" and field.dtype == "uint8":
        facts |= {"value_range": list(spec.value_range)}  # the values of the pixels 0 and 255
    elif field.role == "image":
        facts |= {"image_scale": spec.image_scale, "image_decoder": spec.image_decoder}
        facts |= {} if spec.image_shift is None else {"image_shift": spec.image_shift}
    return facts


def _rendered(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, allow_nan=False) + "\n").encode()
