"""What stands at the place of a store: who makes it, and how its recipe differs from another one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nfm.storage.errors import StorageError, by
from nfm.storage.files.atomic import read_json
from nfm.storage.files.paths import as_path, exists
from nfm.storage.format import untrusted
from nfm.storage.format.spec import DRAFT, SPEC, StoreSpec

WRITER = "writer"  # in the spec.json of PairWriter: whether it computed the digest of the source or was given it
UNSEALED = "a pair store without a sealed generation"
MEND = "restore it from a copy, or run `nfm repair` on the store, which says what makes it again"  # a bad file


def again(root: str | Path) -> str:
    """What makes the missing shards of this store, as an order to its user: whoever made the others."""
    where, body = as_path(root), dict[str, Any]()
    with suppress(StorageError):
        body = read_json(where / SPEC)
    if "stage" in body:
        copied = "fingerprint" in body and not str(body["fingerprint"]).startswith(where.name)
        return "copy it again from the artifact that the pairs stage made" if copied else "run the pairs stage again"
    if "exported" in body:
        return "run the same `nfm pairs export` again"
    if WRITER in body or (not body and begun(where)):
        return "open it again with `PairWriter` and its spec, and write on from next_slot"
    return "make it again with the program that made it"


def made_by_a_command(spec: Mapping[str, Any]) -> str | None:
    """Who made the store of this spec.json, if what it holds follows from a config or from another store."""
    if "stage" in spec:
        return "the pairs stage made this store, and `nfm run pairs` with a larger pairs.draws adds draws to it"
    if "exported" in spec:
        return "`nfm pairs export` made this store, and adds the draws by which its source has grown"
    return None


def begun(root: str | Path) -> bool:
    """Whether `PairWriter` has begun a store there and not yet written its spec.json."""
    return exists(as_path(root) / DRAFT)


def unsealed(root: str | Path) -> str:
    """What seals a store that has no generation."""
    return f"{again(root)}; or, if a draw is complete, seal it with `nfm pairs seal {root}`"


def differences(there: StoreSpec, here: StoreSpec) -> str:
    """Each word in which two recipes differ, with both values; the word that a user gave is named."""
    theirs, ours = _words(there), _words(here)
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return "; ".join(f"its {name} is {_shown(theirs.get(name))}, here {_shown(ours.get(name))}" for name in names)


def _words(spec: StoreSpec) -> dict[str, Any]:
    words = spec.to_dict()
    fields, options = words.pop("fields"), words.pop("coupling_options", None)
    return words | dict(options or {}) | {f["name"]: f"{f['dtype']} {by(f['shape'])}" for f in fields}


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, list) else "not stated" if value is None else untrusted.shown(value)


def other_inputs(there: object, here: object) -> str:
    """The inputs in which two specs differ, by their content; empty if in none."""
    theirs, ours = _contents(there), _contents(here)
    names = [role for role in theirs | ours if theirs.get(role) != ours.get(role)]
    return "; ".join(f"its {role} is {theirs.get(role, 'none')}, here {ours.get(role, 'none')}" for role in names)


def _contents(inputs: object) -> dict[str, str]:
    stated = inputs.items() if isinstance(inputs, Mapping) else ()
    return {role: f"content {str(one.get('content_digest'))[:12]}" for role, one in stated if isinstance(one, Mapping)}
