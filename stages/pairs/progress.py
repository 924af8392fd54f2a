"""How far a pair store is, by listing alone, while any number of processes write to it."""

from __future__ import annotations

from pathlib import Path

from nfm.storage.errors import StorageError
from nfm.storage.files.paths import names_in
from nfm.storage.format.spec import parse_name, read_spec


def committed(out: Path, draws: int) -> dict[str, int]:
    """Counts of the first `draws` draws: shards and pairs that are committed and that there will be, shards failed.

    `failed` counts shards that were set aside with their traceback and that have no commit since.
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
            continue  # a temporary
        if file.endswith(suffix) and draw < draws and shard < shards:
            found.add((draw, shard))
    return found
