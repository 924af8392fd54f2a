"""Layout `blocks` in stock WebDataset, none of our code: `python examples/stock_webdataset.py STORE`.

A tar sample is a block of up to 256 pairs, in a shuffled order fixed at ingestion; shuffle blocks with `.shuffle` and
pairs within a block by indexing. Images are uint8 (or the floats of latents), noise float16, float32, or int8 in steps
of 1/20. Convention: only x and z are stored; with t = 0 the image and t = 1 the noise, regress noise - image.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import webdataset as wds


def pairs(store: str, draw: int = 0) -> Iterator[tuple[Any, Any, Any]]:
    """Blocks of one draw of the newest generation: image [n, ...], noise [n, ...], label [n] as they are stored."""
    spec = json.loads(Path(store, "spec.json").read_text(encoding="utf-8"))["store"]
    if spec["layout"] != "blocks" or spec["codec"] == "seeded":
        other = f"{store} has layout {spec['layout']} and codec {spec['codec']}"
        sys.exit(f"{other}; see nfm pairs export --layout blocks --codec float16")
    sealed = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(store).glob("manifest.g*.json"))]
    whole = [manifest for manifest in sealed if "part_of" not in manifest]
    if not whole:
        sys.exit(f"{store} is not finished: run the command that makes it to its end")
    shards = whole[-1]["shards"]  # of a large store in a Parquet file beside the manifest
    if isinstance(shards, dict):
        shards = pq.read_table(Path(store, shards["file"]), columns=["name", "payload"]).to_pylist()
    mine = [shard["payload"] for shard in shards if shard["name"].startswith(f"d{draw:03d}-")]
    blocks = wds.WebDataset([str(Path(store, tar)) for tar in mine], shardshuffle=False).decode()
    yield from blocks.to_tuple("image.npy", "noise.npy", "label.npy")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(f"{sum(len(image) for image, _noise, _label in pairs(sys.argv[1]))} pairs of draw 0")
