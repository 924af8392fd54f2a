"""JSON with other values and a right digest, and JSON that no serialiser writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .mutate_bytes import files_in, outside_name
from .signing import write_signed

INTEGERS = (-1, 0, 1, 2, 3, 7, 255, 256, 10**5, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64)
HUGE = (10**30, 10**400, -(2**63), -(2**70))
FLOATS = (0.5, -0.0, 1.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"))
WORDS = (
    "", ".", "..", "/", "\0", "\n", "a" * 5000, "\ud800", "é", "spec.json", "d000-s00000", "d000-s00001", "d001-s00000",
    "d999-s99999", "float16", "float32", "float64", "int8", "uint8", "object", "|O", "O", "V8", "U4", "datetime64[s]",
    "blocks", "samples", "zarr", "int8", "image", "noise", "label", "slot", "%s%n", "{0}", "0" * 64, "g" * 64, "NaN",
    "s3://bucket/x", "http://127.0.0.1:9/x", "memory://x/y", "file:///etc/passwd", "shards", "commits/d000-s00000.json",
)  # fmt: skip


def hostile(old: Any, outside: Path, rng: random.Random) -> Any:
    """A value to put in the place of `old`."""
    near: list[Any] = [None, True, False, [], {}, [old], {"a": old}, [old] * 1000]
    if isinstance(old, int):
        near += [old + 1, old - 1, old * 2, -old, str(old)[:4000], old % 10**9 + 0.5] * 2
    if isinstance(old, str):
        near += [old[:-1], old + "x", old.upper(), old[::-1], old * 50, f"./{old}", old + "\0", old + "/"] * 2
    if isinstance(old, list):
        near += [old + old, old[:-1], old[1:], old[::-1]] * 2
    return rng.choice(
        [
            lambda: rng.choice(near),
            lambda: rng.choice(INTEGERS),
            lambda: rng.choice(HUGE),
            lambda: rng.choice(FLOATS),
            lambda: rng.choice(WORDS),
            lambda: outside_name(outside, rng),
        ]
    )()


def json_value(root: Path, outside: Path, rng: random.Random) -> str:
    """Some values of a JSON file become others; a file that had a digest gets the right one."""
    path = rng.choice(files_in(root, ".json"))
    body = json.loads(path.read_bytes())
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(body))
        if not places:
            break
        holder, key = rng.choice(places)
        if isinstance(holder, dict) and rng.random() < 0.1:
            del holder[key]
            done.append(f"-{key}")
            continue
        if rng.random() < 0.15:
            other, place = rng.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = json.loads(json.dumps(other[place]))
        else:
            holder[key] = hostile(holder[key], outside, rng)
        done.append(f"{key}={str(holder[key])[:40]!r}")
    write_signed(path, body)
    return f"{path.name}: {', '.join(done)}"


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        if key != "digest":
            yield value, key
            yield from _places(item)


def json_text(root: Path, outside: Path, rng: random.Random) -> str:
    """A JSON file as no serialiser writes it."""
    path = rng.choice(files_in(root, ".json"))
    data = path.read_bytes()
    depth = rng.choice((500, 5_000, 200_000))
    texts = {
        "deep list": b'{"a":' + b"[" * depth + b"]" * depth + b"}",
        "deep object": b'{"a":' * depth + b"1" + b"}" * depth,
        "unclosed": b"[" * depth,
        "huge integer": b'{"format": ' + b"9" * depth + b"}",
        "repeated key": data.replace(b"{", b'{"digest": "x", "format": 1, "store": 3, ', 1),
        "mark": b"\xef\xbb\xbf" + data,
        "latin": data + "é".encode("latin-1"),
        "empty": b"",
        "zeros": bytes(depth),
        "utf-16": data.decode(errors="replace").encode("utf-16"),
        "list": b"[1, 2]",
        "more": data + data,
        "spaced": data + b" " * depth,
        "surrogate": data.replace(b": 1", b': "\\ud800"', 1),
    }
    what = rng.choice(list(texts))
    path.write_bytes(texts[what])
    return f"{path.name}: {what}"
