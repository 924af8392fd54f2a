"""The README of a pair store, as hubs show it: what it is, from which teacher and data, its figures, how to read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nfm.stages.couplings.facts import facts_of
from nfm.stages.display.units import size
from nfm.stages.pairs import coupling_advice
from nfm.storage import PairStore
from nfm.storage.errors import Misused, by
from nfm.storage.files import atomic
from nfm.storage.files.paths import as_path, exists
from nfm.storage.files.small_files import read_bytes
from nfm.storage.format.codecs import CODECS
from nfm.storage.format.spec import StoreSpec
from nfm.storage.layouts import LAYOUTS

NAME = "README.md"
MARK = "<!-- written by `nfm pairs card` -->"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip
_ROWS = {"transport cost", "two-sample AUC", "exact", "approximate"}  # of the coupling report


def write(where: str | Path, data: Mapping[str, Any] | None = None, output: Path | None = None) -> Path:
    """Writes the card of the store at `where` to `output`, by default README.md in the store; returns its path.

    `data` is the record of the images in their artifact's manifest: name, origin, licence. Raises Misused if
    another file than a card of ours is there.
    """
    store = PairStore.open(where)
    target = as_path(store.root) / NAME if output is None else output
    if exists(target) and MARK.encode() not in read_bytes(target):
        raise Misused(f"{target}: somebody's own file; move it away, or write elsewhere with -o")
    atomic.write_bytes(target, card(store, data).encode())
    return target


def card(store: PairStore, data: Mapping[str, Any] | None = None) -> str:
    """The card of a store as Markdown, with the YAML header that Hugging Face's hub reads."""
    named = (data or {}).get("name") or f"images {store.spec.source[:12]}"
    named = f"a student of {named}" if _generated(store.spec) else named
    return "\n".join([*_header(store, data or {}, named), *_text(store, data or {}, named)]) + "\n"


def _header(store: PairStore, data: Mapping[str, Any], named: str) -> Iterator[str]:
    """What the hub searches by, and which files its viewer shows. Only tars hold samples that it knows."""
    records = store.manifest["records"]
    yield "---"
    yield f"pretty_name: {_quoted(f'{store.spec.coupling} pairs of {named}')}"
    if data.get("licence"):
        yield "license: other"
        yield f"license_name: {_quoted(data['licence'])}"
    yield f"size_categories: [{next((name for most, name in _SIZES if records < most), 'n>1B')}]"
    yield "tags: [flow-matching, coupling, noise-image-pairs, nfm-pairs, webdataset]"
    if not LAYOUTS[store.spec.layout].by_field:
        yield "configs:"
        yield "- config_name: default"
        yield "  data_files:"
        yield "  - split: train"
        yield '    path: "shards/*.tar"'
    yield "---"


def _text(store: PairStore, data: Mapping[str, Any], named: str) -> Iterator[str]:
    spec, body = store.spec, store.manifest
    yield f"{MARK}\n\n# {spec.coupling} pairs of {named}\n"
    yield (
        "Each record is an image and the noise that it is paired with. A flow-matching student that trains on them "
        "regresses `noise - image` at `(1 - t) image + t noise`, and samples from N(0, I). This is generation "
        f"{store.generation}{_writer(body)}.\n"
    )
    yield "| | |\n|---|---|"
    yield from (f"| {name} | {_cell(value)} |" for name, value in _facts(store, data).items())
    report = body.get("coupling_report")
    if report is not None:
        yield "\n## The pairs\n\n| | |\n|---|---|"
        yield from (f"| {name} | {_cell(v)} |" for name, v in coupling_advice.lines(report).items() if name in _ROWS)
        yield from (f"\n{text[:1].upper()}{text[1:]}." for text in coupling_advice.advice(report))
    yield "\n## How to read it\n\n```python"
    yield "from nfm.storage import PairStore  # pip install nfm-pairs\n"
    yield 'store = PairStore.open("FOLDER")  # a folder, or a URL such as s3://bucket/store'
    yield "for batch in store.batches(batch_size=256, seed=0, epochs=1):"
    sizes = ", ".join(map(str, spec.image_shape))
    yield f"    batch.image, batch.noise  # float32 [B, {sizes}]"
    yield "    batch.label  # int64 [B]" + ("" if spec.has("label") else ", all -1: this store has no labels")
    yield "```\n"
    yield f"{_stock(spec.layout)}{_made(spec)} `nfm pairs verify FOLDER` checks every byte."


def _facts(store: PairStore, data: Mapping[str, Any]) -> dict[str, Any]:
    spec, body = store.spec, store.manifest
    learnt = "data that the student learnt" if _generated(spec) else "data"
    options = dict(spec.coupling_options or {})
    facts = {
        "coupling": spec.coupling,
        "origin": options.pop("origin", None),
        "how": ", ".join(f"{name} {value}" for name, value in options.items()) or None,
        "noise is N(0, I)": "exactly, before it is stored" if facts_of(spec.coupling).gaussian else None,
        "images": f"{spec.rows:,} of {by(spec.image_shape)}, {spec.field('image').dtype}",
        "images are": "samples of the student, none of the data" if _generated(spec) else None,
        "flips": "some of the images are mirrored" if spec.flips else None,
        learnt: ", ".join(filter(None, (data.get("name"), data.get("origin")))) or f"content {spec.source}",
        "licence of the data": data.get("licence"),
        "classes": spec.classes,
        "teacher": spec.teacher,
        "potential": spec.potential,
        "student": spec.student,
        "draws": store.draws,
        "pairs": f"{body['records']:,}, {size(store.sealed.bytes)}",
        "codec of the noise": spec.codec,
        "layout": spec.layout,
        "seed": spec.seed,
        "content": store.content_digest,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _generated(spec: StoreSpec) -> bool:
    """Whether a student made the images from the noise."""
    return facts_of(spec.coupling).image == "generated"


def _writer(body: Mapping[str, Any]) -> str:
    version = (body.get("versions") or {}).get("nfm-pairs")
    return f", written by nfm-pairs {version}" if version else ""


def _stock(layout: str) -> str:
    """How a program that does not have nfm-pairs reads the shards."""
    if LAYOUTS[layout].by_field:
        return "Zarr opens the folder: a group for each draw, with an array for each field."
    if layout == "samples":
        return "The shards are WebDataset tars, with a `.npy` member for each field of a record."
    return (
        "The shards are tars with a `.npy` member for each field of a block of records. "
        "`nfm pairs export FOLDER TARGET --layout samples` writes WebDataset's usual form, a sample a record."
    )


def _made(spec: StoreSpec) -> str:
    """Where the noise is, if it is not in the shards."""
    if not CODECS[spec.codec].made:
        return ""
    return (
        " They hold no noise: nfm-pairs makes it from the seed when it reads. `nfm pairs export FOLDER TARGET --codec "
        "float16` writes it for programs that do not have nfm-pairs."
    )


def _quoted(text: Any) -> str:
    """A YAML scalar that is text whatever stands in it."""
    return json.dumps(str(text))


def _cell(value: Any) -> str:
    """A table's cell: somebody's text makes no columns, no lines and no HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
