"""The description of a pair store: recipe, generation, sizes, moments; from a folder, a manifest or a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nfm.stages.pairs import coupling_advice
from nfm.storage import PairStore
from nfm.storage.errors import by
from nfm.storage.ledger import seal
from nfm.storage.ledger.row_fields import RowField, row_field_names

RECIPE = ("coupling", "layout", "codec", "noise_step", "image_scale", "image_shift", "image_decoder", "rows",
          "rows_per_shard", "eta", "sigma_f", "seed", "flips", "classes", "teacher", "potential", "student",
          "source")  # fmt: skip
ENCODED = ("precision", "batch_sizes", "noise_error")  # what the commits say about the encoding
ONLY_WHERE_SET = ("noise_step", "image_scale", "image_shift", "image_decoder", "potential", "student")


def info(where: str | Path) -> dict[str, Any]:
    """The recipe of a store and the figures of its pinned generation, by the names that users see."""
    store = PairStore.open(where)
    spec, body = store.spec, store.manifest
    options = spec.coupling_options or {}
    size, excluded = store.sealed.bytes, store.sealed.excluded
    recipe = {key: getattr(spec, key) for key in RECIPE}
    shown = {key: value for key, value in recipe.items() if value is not None or key not in ONLY_WHERE_SET}
    fields = ", ".join(
        _field(field.name, field.dtype, field.shape) + ("" if field in spec.stored else " (made when it is read)")
        for field in spec.fields
    )
    row_fields = [RowField.open(store.root, name) for name in row_field_names(store.root)]
    joined = ", ".join(_field(field.name, field.dtype.name, field.shape) for field in row_fields)
    return {
        "generations": ", ".join(seal.manifest_path(".", n).name for n in seal.numbers(store.root)),
        **shown,
        **{f"coupling {name}" if name != "origin" else name: value for name, value in options.items()},
        "fields": fields,
        "row fields": joined or None,
        "draws": store.draws,
        "pairs": body["records"],
        "bytes": size,
        "bytes per pair": round(size / body["records"], 1),
        **({"excluded pairs": sum(len(hole.slots) for hole in excluded)} if excluded else {}),
        "clipped": body.get("clipped", 0),
        "order key": store.order_key,
        "content": store.content_digest,
        **{f"exported {key}": value for key, value in (body.get("exported") or {}).items()},
        **{f"noise {key}": value for key, value in body["moments"].items()},
        **{key.replace("_", " "): body[key] for key in ENCODED if body.get(key) is not None},
        **_reported(body.get("coupling_report"), store.root),
    }


def _field(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    return f"{name} {dtype} {by(shape)}" if shape else f"{name} {dtype}"


def _reported(report: dict[str, Any] | None, where: str | Path) -> dict[str, Any]:
    """The coupling report in a manifest, with advice; or how to make one."""
    if report is None:
        return {"coupling report": f"none in this manifest; `nfm pairs report {where}` measures the pairs"}
    said = {f"advice {number}": text for number, text in enumerate(coupling_advice.advice(report), 1)}
    return coupling_advice.lines(report) | said
