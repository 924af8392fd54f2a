"""The progress of a pair store, by listing its files, while any number of processes write to it."""

from __future__ import annotations

from pathlib import Path

from nfm.storage.errors import StorageError
from nfm.storage.files.paths import names_in
from nfm.storage.format.spec import parse_name, read_spec


def committed(out: Path, draws: int) -> dict[str, int]:
    """Counts for the first `draws` draws: committed and total shards and pairs, and failed shards.

    `failed` counts shards that have a traceback and still no commit.
    """
    spec = read_spec(out)
    done = _shards(names_in(out / "commits"), ".json", draws, spec.shards_per_draw)
    failed = _shards(names_in(out / "failed"), ".txt", draws, spec.shards_per_draw) - done
    return {
        "shards": len(done),
        "all_shards": spec.shards_per_draw * draws,
        "pairs": sum(len(spec.slots_of(shard)) for _, shard in done),
        "all_pairs": spec.rows * draws,
        "failed": len(failed),
    }


def _shards(files: list[str], suffix: str, draws: int, shards: int) -> set[tuple[int, int]]:
    found = set()
    for file in files:
        try:
            draw, shard = parse_name(file.removesuffix(suffix))
        except StorageError:
            continue  # a temporary file
        if file.endswith(suffix) and draw < draws and shard < shards:
            found.add((draw, shard))
    return found
