"""The data stage reads images or latents and writes shards with keys and labels, in a seeded random order.

A held-out part (the source's own test set, or else a seeded fraction) is written separately and never becomes pairs.
Records that cannot be used are listed in `rejected.parquet` with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.stages.base import (
    Inputs,
    Reporter,
    Result,
    StageError,
    Stopped,
    Unfit,
)
from nfm.stages.data import parts, records
from nfm.stages.data.config import DataConfig
from nfm.stages.data.cost import of_planned, of_source
from nfm.stages.data.ingest import decode, ingested, lacking, planned, threads_of
from nfm.stages.data.parts import Parts
from nfm.stages.data.reading.tree import Skipped
from nfm.stages.data.settings import check_names, check_owners, check_settings, tell_untrained
from nfm.stages.data.source import Encoded
from nfm.stages.data.sources import SOURCES, Source, opened
from nfm.stages.executors import EXECUTORS, ray_cluster
from nfm.stages.executors.jobs import Outcome
from nfm.stages.trained.costs import Cost
from nfm.stages.trained.devices.timing import Clock
from nfm.storage.dataset.record import DATASET
from nfm.storage.dataset.shards import ReadyShard
from nfm.storage.dataset.writer import DatasetWriter
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import as_path
from nfm.storage.format.order import permute

NAME = "data"
VERSION = 1
WORKING = (parts.FOLDER, records.FOLDER, "failed")
STOPS_AT_ONCE = True  # what is committed stays, and nothing else is worth waiting for

WRITE_CHUNK = 1024
TOLD_REASONS = 8
PRODUCTS = ("train", "heldout", "train.parquet", "heldout.parquet", "rejected.parquet", "dataset.json")

Chunk = tuple[np.ndarray | ReadyShard, np.ndarray, list[str]]  # images [n, C, H, W] as stored, labels [n], keys

# Licence and origin of known inputs, by the digest of their content, wherever the files are.
KNOWN: dict[str, dict[str, Any]] = {
    "a99ec17e1eff8dc9479a239228d75b0cf69e35db87870a51daf5aecf9e977067": {
        "name": "digits",
        "licence": "CC BY 4.0",
        "origin": "scikit-learn's digits: the test set of UCI Optical Recognition of Handwritten Digits "
        "(E. Alpaydin, C. Kaynak)",
    },
    "0ac8d030b7547efc769e0998c29c12b3d5f9a3796a3ad1f57754a8f2fb2a7f27": {
        "name": "fashion-mnist",
        "licence": "MIT",
        "origin": "Fashion-MNIST (Zalando SE, 2017; arXiv 1708.07747)",
        "classes": (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    },
}


def open_source(config: DataConfig) -> Source:
    """The source in the config. Its records are listed but not loaded."""
    check_owners(config)
    check_names(config)
    source: Source = opened(config)
    return source


def starts_anew(config: DataConfig) -> bool:
    """Whether a stopped run leaves nothing: arrays are copied as a whole, encoded images are decoded in parts."""
    return not issubclass(SOURCES[config.source], Encoded)


def needs(config: DataConfig) -> None:
    """Raises StageError if something that a run needs is missing: the Ray cluster."""
    if EXECUTORS[config.executor].cluster:
        ray_cluster.check_reachable(config.ray_address, 'data.executor = "ray"', "--set data.executor=serial")


def source_identity(config: DataConfig, known: Path | None = None) -> dict[str, Any]:
    """The digest of the input's content: {digest, files, bytes}. Part of the fingerprint of the data stage.

    `known` is a folder that keeps digests of unchanged files.
    """
    return open_source(config).digest(known)


def cost(config: DataConfig, facts: Mapping[str, Any], clock: Clock | None) -> Cost:
    """What is written, and the time of decoding: of the images that `facts` tell of, or else of the source itself."""
    if "images" in facts:
        return of_planned(facts, clock is not None)
    source = open_source(config.model_copy(update={"threads": threads_of(config)}))
    return of_source(config, source, np.concatenate(split_rows(source, config)), clock)


def split_rows(source: Source, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The rows of (train, heldout) in seeded random order. `limit` applies before the fraction is taken."""

    def shuffled(rows: np.ndarray, split: str) -> np.ndarray:
        return rows[permute(np.arange(len(rows)), len(rows), f"data/{split}/{config.seed}")][: config.limit]

    order, test = shuffled(np.flatnonzero(~source.test), "train"), np.flatnonzero(source.test)
    if len(test):
        return order, shuffled(test, "heldout")
    # At least one row on either side, so that a tiny source has both.
    count = min(max(round(config.heldout * len(order)), 1), len(order) - 1) if config.heldout else 0
    return order[count:], order[:count]


def run(config: DataConfig, inputs: Inputs, out: Path, report: Reporter) -> Result:
    """Writes the images as shards. Parts that a killed run decoded are used; the rest starts from the beginning."""
    if report.stopping:
        raise Stopped
    for leftover in (*PRODUCTS, "scratch"):
        _remove(out / leftover)
    source = open_source(config)
    check_settings(config, source, report)
    identity = source.digest()
    own, apart = split_rows(source, config)
    rows = np.concatenate([own, apart])

    scratch = out / "scratch"
    scratch.mkdir()
    try:
        if isinstance(source, Encoded):
            loaded = ingested(source, rows, source.labels[rows], len(own), config, out, report)
        else:
            if config.executor != "serial":
                check_parts(config)
            loaded = source.load(rows, scratch, report)
        rejected = [(source.keys[rows[position]], reason) for position, reason in loaded.rejected.items()]
        if rejected:
            for line in _set_aside(rejected, len(rows), config.max_rejected, out / "rejected.parquet"):
                report.say(f"set aside: {line}")
        about = _about(config, source, identity)
        image_shape = loaded.images.shape[1:]
        dtype = loaded.images.dtype.name
        if dtype == "uint8" and (config.image_scale or config.image_decoder):
            raise Unfit("data.image_scale and data.image_decoder are of latents; these images are uint8 pixels")
        classes = list(about.pop("classes"))
        usable = np.setdiff1d(np.arange(len(rows)), list(loaded.rejected))
        train, heldout = np.split(usable, [np.searchsorted(usable, len(own))])
        if not len(train):
            why = f"all of them with reasons: {out / 'rejected.parquet'}" if rejected else "data.heldout leaves none"
            raise StageError(f"none of the {len(own)} training images can be used: {why}")
        tell_untrained(config, source, rows[train], rows[heldout], report)
        (out / DATASET).unlink(missing_ok=True)  # of a run that was killed before its manifest
        writer = DatasetWriter(
            out, about["name"], image_shape, classes, config.rows_per_shard, dtype, config.image_scale,
            config.image_decoder,
        )  # fmt: skip
        captions = getattr(source, "captions", None)
        for split, positions, done in (("train", train, 0), ("heldout", heldout, len(train))):
            chunks = _chunks(source, loaded.images, rows, positions, split, config.rows_per_shard)
            texts = None if captions is None else [captions[row] for row in rows[positions].tolist()]
            writer.write_split(split, len(positions), _reported(chunks, done, len(usable), report), texts)
        payload = writer.close(rejected)
    finally:
        _remove(scratch)
    metrics = {
        "images": len(train),
        "heldout": len(heldout),
        "rejected": len(rejected),
        "classes": len(source.classes),
        "image_shape": list(image_shape),
        **({} if dtype == "uint8" else {"image_dtype": dtype}),
        **({"skipped": skipped} if (skipped := sum(entry["paths"] for entry in loaded.skipped.values())) else {}),
    }
    return Result(
        payload=list(payload),
        files=list(writer.files),
        digests=payload | writer.files,
        metrics=metrics,
        # Not in the dataset itself: paths that hold no image do not change the content digest.
        extra={"dataset": about | {"source": identity}}
        | {name: told for name in ("skipped", "notes") if (told := getattr(loaded, name))},
    )


def _chunks(
    source: Source, images: np.ndarray | Parts, rows: np.ndarray, positions: np.ndarray, split: str, each: int
) -> Iterator[Chunk]:
    """The chosen images in order, by shards of `each`. A part that already is the shard is not read."""
    for number, first in enumerate(range(0, len(positions), each)):
        shard = positions[first : first + each]
        ready = images.ready(shard, f"{split}-s{number:05d}") if isinstance(images, Parts) else None
        size = len(shard) if ready else WRITE_CHUNK
        for start in range(0, len(shard), size):
            chosen = shard[start : start + size]
            keys = [source.keys[row] for row in rows[chosen]]
            yield ready or images[chosen], source.labels[rows[chosen]], keys


def pieces_left(config: DataConfig, inputs: Inputs, out: Path, report: Reporter) -> list[str]:
    """The names of the parts that are not decoded yet, for the tasks of an array; their plan is written."""
    check_parts(config)
    source = open_source(config)
    assert isinstance(source, Encoded)
    check_settings(config, source, report)
    own, apart = split_rows(source, config)
    rows, shared = np.concatenate([own, apart]), as_path(mirror.origin(out))
    plan, _ = planned(source, rows, source.labels[rows], len(own), config, shared, report)
    return lacking(shared, plan)


def make_pieces(
    config: Mapping[str, Any], inputs: Inputs, out: Path, mine: Sequence[str], left: Sequence[str], report: Reporter
) -> list[Outcome]:
    """Decodes the parts `left` of those that are a task's. Returns the failures."""
    return decode(config, out, mine, left, report)


def check_parts(config: DataConfig) -> None:
    """Raises Unfit for a source whose work cannot be shared."""
    if starts_anew(config):
        where = "" if config.executor == "serial" else f'data.executor = "{config.executor}": '
        raise Unfit(
            f'{where}source "{config.source}" has no encoded images, one process copies its arrays; leave '
            "data.executor out, and run `nfm run data`"
        )


def _reported(chunks: Iterator[Chunk], done: int, total: int, report: Reporter) -> Iterator[Chunk]:
    report.progress(done, total, "images")
    for chunk in chunks:
        if report.stopping:
            raise Stopped
        yield chunk
        done += len(chunk[1])
        report.progress(done, total, "images")


def _set_aside(rejected: Sequence[tuple[str, str]], total: int, share: float, table: Path) -> list[str]:
    """Writes the table of rejected records, which must remain after a failure. Fails if there are too many.

    Returns a line for each reason.
    """
    columns = {"key": [key for key, _ in rejected], "reason": [reason for _, reason in rejected]}
    pq.write_table(pa.table(columns), table)
    aside = Skipped()
    for key, reason in rejected:
        aside.add(reason, key)
    lines = aside.lines(TOLD_REASONS)
    if len(rejected) > share * total:
        raise StageError(
            f"{len(rejected)} of {total} images cannot be used, data.max_rejected = {share:g} allows "
            f"{int(share * total)}: {'; '.join(lines)}. All of them with reasons: {table}. Repair or remove them, or "
            "raise data.max_rejected, the share of the images that may be set aside"
        )
    return lines


def _about(config: DataConfig, source: Source, identity: dict[str, Any]) -> dict[str, Any]:
    """Name, licence, origin and class names: from the config, else from what is known about this content."""
    said = {key: value for key in ("name", "licence", "origin", "classes") if (value := getattr(config, key))}
    unknown = {"name": source.name, "licence": "unknown", "origin": "unknown", "classes": source.classes}
    unknown |= {key: getattr(source, key) for key in ("licence", "origin") if hasattr(source, key)}
    return unknown | KNOWN.get(identity["digest"], {}) | said


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
