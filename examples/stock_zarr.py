"""Layout `zarr` in stock Zarr, none of our code: `python examples/stock_zarr.py STORE` (a folder or a URL).

A draw is a group, a field an array [rows, ...]; slices along the chunks (256 rows) are what is fast. The group's
attributes carry the store's spec. Convention: only x and z are stored; with t = 0 the image and t = 1 the noise,
regress noise - image.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import zarr


def pairs(store: str, draw: int = 0, rows: int = 256) -> Iterator[tuple[Any, Any, Any]]:
    """Slices of one draw: image [n, ...], noise [n, ...], label [n] as they are stored."""
    try:
        fields: Any = zarr.open_group(store, mode="r")[f"d{draw:03d}"]
        fields["noise"]
    except (zarr.errors.GroupNotFoundError, KeyError) as error:
        sys.exit(f"{store} has no {error} of Zarr: see nfm pairs export --layout zarr --codec float16")
    for start in range(0, fields["image"].shape[0], rows):
        part = slice(start, start + rows)
        yield fields["image"][part], fields["noise"][part], fields["label"][part]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(f"{sum(len(image) for image, _noise, _label in pairs(sys.argv[1]))} pairs of draw 0")
