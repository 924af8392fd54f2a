"""How to store the noise: bytes, error and speed of the codecs, beside peers and Shannon's bound for a Gaussian.

`python -m benchmarks.codecs [--store STORE]` takes values of N(0, 1), and of a store's own noise where one is given,
through every codec on one thread, prints a table each and writes `benchmarks/results/codecs.json`. What follows from
it is in `docs/codecs.md`. Of a store, only its content digest is recorded.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.told import machine, versions
from nfm.pipeline.cli.options import LOCAL_PATH, PLACE
from nfm.stages.display.tables import aligned
from nfm.storage import PairStore
from nfm.storage.format import codecs
from nfm.storage.format.convert import to_float32

CHUNK = 256 * 784  # values that are compressed together: a block of Fashion-MNIST's records
Array = np.ndarray[Any, np.dtype[Any]]
Encode = Callable[[Array], tuple[Any, int]]  # float32 -> (what is stored, bytes)
Decode = Callable[[Any, Array], None]  # fills a float32 array from what is stored


@dataclass(frozen=True)
class Codec:
    """A line of the table; `limit` is the largest value of either sign, None without one."""

    name: str
    encode: Encode
    decode: Decode
    limit: float | None = None
    needs: str | None = None


def ours(name: str, codec: str, step: float | None = None) -> Codec:
    """A codec of the store, as `write_shard` and the reader use it."""

    def encode(z: Array) -> tuple[Array, int]:
        stored, _ = codecs.pack(z, codec, step)
        return stored, stored.nbytes

    def decode(stored: Array, out: Array) -> None:
        to_float32(stored, (-1, 1), out, step)

    return Codec(name, encode, decode, None if step is None else codecs.CODECS[codec].limit * step)


def zstd(name: str, before: Callable[[Array], Array]) -> Codec:
    """Shuffled bytes through zstd at level 5, by numcodecs' Blosc, as a Zarr user writes it."""

    def blosc() -> Any:
        from numcodecs import Blosc
        from numcodecs import blosc as settings

        settings.use_threads = False
        return Blosc(cname="zstd", clevel=5, shuffle=Blosc.SHUFFLE)

    def encode(z: Array) -> tuple[Any, int]:
        stored = before(z)
        data = blosc().encode(stored)
        return (data, stored.dtype), len(data)

    def decode(stored: Any, out: Array) -> None:
        data, dtype = stored
        to_float32(np.frombuffer(blosc().decode(data), dtype), (-1, 1), out)

    return Codec(name, encode, decode, needs="numcodecs")


def bit_rounded(keep: int) -> Callable[[Array], Array]:
    """float32 with all but `keep` bits of the mantissa rounded to zero."""

    def rounded(z: Array) -> Array:
        from numcodecs import BitRound

        return np.frombuffer(BitRound(keep).encode(z), np.float32)

    return rounded


def entropy_coded(name: str, step: float) -> Codec:
    """The uniform quantiser with an ideal entropy coder: the entropy of its whole numbers' shares, nothing is coded."""

    def encode(z: Array) -> tuple[Array, int]:
        stored = np.rint(z / np.float32(step)).astype(np.int32)
        counts = np.unique(stored, return_counts=True)[1]
        bits = float(-(counts * np.log2(counts / len(z))).sum())
        return stored, math.ceil(bits / 8)

    def decode(stored: Array, out: Array) -> None:
        np.multiply(stored, np.float32(step), out=out)

    return Codec(name, encode, decode)


CODECS = (
    ours("float32", "float32"),
    ours("float16", "float16"),
    ours("int8, step 1/20", "int8", 1 / 20),
    zstd("float16 + shuffle + zstd", lambda z: z.astype(np.float16)),
    zstd("BitRound 6 + shuffle + zstd", bit_rounded(6)),
    zstd("BitRound 4 + shuffle + zstd", bit_rounded(4)),
)
IDEAL = (
    entropy_coded("entropy of the quantiser, step 1/64", 1 / 64),
    entropy_coded("entropy of the quantiser, step 1/20", 1 / 20),
)


def studied(codec: Codec, z: Array, passes: int, timed: bool) -> dict[str, Any]:
    """One codec over float32 values z [n], a chunk at a time."""
    if codec.needs is not None and importlib.util.find_spec(codec.needs) is None:
        return {"name": codec.name, "not_measured": f"not installed: {codec.needs}"}
    out, rates = np.empty_like(z), []
    size = 0
    for _ in range(passes + 1 if timed else 1):
        started = time.thread_time()
        stored = [codec.encode(part) for part in _parts(z)]
        encoded = time.thread_time()
        for (data, _), target in zip(stored, _parts(out)):
            codec.decode(data, target)
        rates.append((z.nbytes / (encoded - started) / 1e6, z.nbytes / (time.thread_time() - encoded) / 1e6))
        size = sum(part for _, part in stored)
    same = isinstance(stored[0][0], np.ndarray) and np.may_share_memory(stored[0][0], z)  # nothing to encode
    error = out.astype(np.float64) - z
    distortion = float(np.mean(error**2))
    bits = 8 * size / len(z)
    bound = 0.5 * math.log2(float(np.mean(z.astype(np.float64) ** 2)) / distortion) if distortion else None
    encode, decode = (statistics.median(rate) for rate in zip(*(rates[1:] or rates)))
    return {
        "name": codec.name,
        "bits": round(bits, 4),
        "bytes": round(bits / 8, 4),
        "rms_error": float(f"{math.sqrt(distortion):.4g}"),
        "max_error": float(f"{np.abs(error).max():.4g}"),
        "clipped_per_million": None if codec.limit is None else round(1e6 * float(np.mean(np.abs(z) > codec.limit)), 3),
        "shannon_bits": None if bound is None else round(bound, 4),
        "gap_bits": None if bound is None else round(bits - bound, 4),
        "encode_mb_per_second": round(encode) if timed and not same else None,
        "decode_mb_per_second": round(decode) if timed else None,
    }


def _parts(values: Array) -> Iterator[Array]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


def noise_of(store: PairStore, values: int) -> Array:
    """Noise of random records of the first draw, in the order of their slots, float32 [values]."""
    each = math.prod(store.spec.field("noise").shape)
    count = min(len(store), -(-values // each))
    slots = np.sort(np.random.default_rng(0).choice(len(store), count, replace=False))
    stored = store.gather(0, slots)["noise"].reshape(-1)
    return codecs.unpack(stored, store.spec.noise_step)[:values]


def source(name: str, z: Array, passes: int, **about: Any) -> dict[str, Any]:
    """The study of one set of values."""
    rows = [studied(codec, z, passes, timed=True) for codec in CODECS]
    rows += [studied(codec, z, passes, timed=False) for codec in IDEAL]
    moments = {"values": len(z), "mean": round(float(z.mean(dtype=np.float64)), 5)}
    return {"source": name, **about, **moments, "variance": round(float(z.var(dtype=np.float64)), 5), "rows": rows}


def as_text(found: dict[str, Any]) -> str:
    """A source's table."""
    keys = ("name", "bits", "bytes", "rms_error", "max_error", "clipped_per_million", "shannon_bits", "gap_bits",
            "encode_mb_per_second", "decode_mb_per_second")  # fmt: skip
    header = (
        "codec",
        "bits",
        "bytes",
        "RMS error",
        "max error",
        "clipped ppm",
        "Shannon",
        "gap",
        "enc MB/s",
        "dec MB/s",
    )
    rows = [[row.get(key) for key in keys] for row in found["rows"]]
    about = {name: value for name, value in found.items() if name != "rows"}
    return ", ".join(f"{name} {value}" for name, value in about.items()) + "\n" + aligned(header, rows)


@click.command()
@click.option("--store", type=PLACE, help="A pair store (folder or URL), for its noise beside N(0, 1).")
@click.option("--values", default=8_000_000, show_default=True, type=click.IntRange(min=1))
@click.option("--passes", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("-o", "--output", default="benchmarks/results/codecs.json", show_default=True, type=LOCAL_PATH)
def main(store: Path | None, values: int, passes: int, output: Path) -> None:
    """Study the codecs of the noise."""
    found = [source("N(0, 1)", np.random.default_rng(0).standard_normal(values, np.float32), passes)]
    if store is not None:
        opened = PairStore.open(store)
        about = {
            "content_digest": opened.content_digest, "coupling": opened.spec.coupling, "codec": opened.spec.codec,
            "shape": list(opened.spec.image_shape),
        }  # fmt: skip
        found.append(source("a store's noise", noise_of(opened, values), passes, **about))
    body = {
        "command": "python -m benchmarks.codecs" + (" --store STORE" if store is not None else ""),
        "machine": machine(),
        "versions": versions("numpy", "numcodecs"),
        "rates": "MB of float32 a second of one thread, median of the passes",
        "sources": found,
    }
    click.echo("\n\n".join(as_text(part) for part in found))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
