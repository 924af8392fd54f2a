"""Makes every digest of a damaged store right again, so that readers go on to read its contents."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError
from nfm.storage.files import atomic


def write_signed(path: Path, body: Any) -> None:
    """A JSON file as ours are written, whatever it holds; with a digest of itself if it had one."""
    if not isinstance(body, dict) or "digest" not in body:
        path.write_text(json.dumps(body, indent=2), encoding="utf-8", errors="surrogatepass")
        return
    try:
        atomic.write_json(path, body)
    except (StorageError, ValueError, RecursionError):  # NaN and the like, which ours never write
        rest = {key: value for key, value in body.items() if key != "digest"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        whole = json.dumps({**rest, "digest": digest}, indent=2, ensure_ascii=False) + "\n"
        path.write_bytes(whole.encode(errors="surrogatepass"))


def reseal(root: Path) -> None:
    """New sizes and digests in every commit, field.json, dataset.json and manifest, from the files that are there."""
    commits: dict[str, dict[str, Any]] = {}
    for path in sorted(root.glob("commits/*.json")):
        body = _read(path)
        if body is not None:
            _update(root, body, "payload", "payload_sha256", "payload_bytes")
            _update(root, body, "index", "index_sha256", "index_bytes")
            write_signed(path, body)
            commits[path.stem] = body
    for path in sorted(root.glob("manifest.g*.json")):
        body = _read(path)
        if body is None or not isinstance(body.get("shards"), list):
            continue
        for entry in (entry for entry in body["shards"] if isinstance(entry, dict)):
            _update(root, entry, "payload", "sha256", "bytes")
            _update(root, entry, "index", "index_sha256", "index_bytes")
            with contextlib.suppress(OSError, TypeError, ValueError):
                entry["commit_sha256"] = _hash(root / f"commits/{entry.get('name')}.json")[0]
        with contextlib.suppress(AttributeError, TypeError, KeyError):
            body["content_digest"] = atomic.content_digest(entry["sha256"] for entry in body["shards"])
        write_signed(path, body)
    for path in [*root.glob("fields/*/field.json"), *root.glob("dataset.json")]:
        body = _read(path)
        if body is not None:
            _walk(path.parent, body)
            write_signed(path, body)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    except (ValueError, RecursionError, OSError):
        return None
    return body if isinstance(body, dict) else None


def _walk(folder: Path, value: Any) -> None:
    if isinstance(value, dict):
        _update(folder, value, "file", "sha256", "bytes")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _walk(folder, item)


def _update(root: Path, body: dict[str, Any], name: str, sha256: str, size: str) -> None:
    if isinstance(body.get(name), str):
        with contextlib.suppress(OSError, ValueError):
            body[sha256], body[size] = _hash(root / body[name])


def _hash(path: Path) -> tuple[str, int]:
    if not path.is_file():
        raise OSError(path)
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), len(data)
