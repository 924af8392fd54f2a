"""The same shards in stock WebDataset, none of our code: `python examples/stock_webdataset.py artifacts/pairs/<fp>`."""

import json
import sys
from pathlib import Path

import webdataset as wds


def main(store: str) -> int:
    """Counts the pairs of draw 0; a tar sample is a block of 256 of them, in a shuffled order fixed at ingestion."""
    manifest = json.loads(sorted(Path(store).glob("manifest.g*.json"))[-1].read_text())
    shards = [str(Path(store, shard["payload"])) for shard in manifest["shards"] if shard["name"].startswith("d000")]
    pairs = 0
    for block in wds.WebDataset(shards, shardshuffle=False).decode():
        image, noise, label = block["image.npy"], block["noise.npy"], block["label.npy"]
        assert image.shape == noise.shape, label.shape
        pairs += len(image)
    return pairs


if __name__ == "__main__":
    print(f"{main(sys.argv[1])} pairs")
