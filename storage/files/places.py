"""Interprets a place that a user wrote: in an argument, a config field, an environment variable or a Python call."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from nfm.storage.errors import NoPlace, StorageError, WrongVariable
from nfm.storage.errors.masked import holds_secret
from nfm.storage.files import clouds

_SCHEMED = re.compile(
    r"(?P<space>\s*)(?P<chain>(?:[a-z][a-z0-9]*::)*)(?P<scheme>[a-z][a-z0-9+.-]+):(?P<slashes>/*)", re.IGNORECASE
)
_FILES = ("file", "local")
# No local file name begins with one of these by accident.
_SCHEMES = ("file", *clouds.CLOUDS, "abfs", "memory", "http", "https")
SECRETS = (
    "a URL with a key, a password or a token, which would be written to manifests and logs; leave it out of the URL: "
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, or "
    "AZURE_STORAGE_CONNECTION_STRING"
)


def as_path(where: str | Path) -> Path:
    """Turns what a user wrote into a path: a local path of pathlib, or for a URL a path of universal_pathlib.

    `~` is the home folder. `file://` is a local path, with %20 and the like decoded. Any other text without a scheme is
    a local path; `./` in front forces this. A Path object is used unchanged. Raises NoPlace, with the remedy, for
    anything else.

    Options of a file system (an endpoint, a profile) come from its own environment variables and from fsspec's
    configuration. Listings are never cached, because other processes may write at the same time. Tested with servers
    of S3, of Google's and Azure's protocol, and with memory://.
    """
    if not isinstance(where, str):
        return _of_a_program(where)
    if not where.strip() or "\0" in where:
        raise NoPlace(repr(where), "names no place; write a path or a URL, or leave it out (. is the current folder)")
    if (found := _SCHEMED.match(where)) is None:
        return _local(where)
    scheme, slashes, rest = found["scheme"].lower(), len(found["slashes"]), where[found.end() :]
    if holds_secret(where):
        raise NoPlace(where, SECRETS)
    if found["space"] and (slashes or scheme in _SCHEMES):
        raise NoPlace(repr(where), "there is a space before the URL: take it away")
    if scheme in _FILES and slashes:
        return _of_file_url(where, slashes, rest)
    if slashes >= 2:
        return _remote(where, found["chain"].lower() + scheme, "/" * (slashes - 2) + rest)
    if slashes or scheme in _SCHEMES:
        right = "file:///path" if scheme in _FILES else f"{found['chain']}{scheme}://{rest}"
        raise NoPlace(where, f"a URL has two slashes: write {right}, or ./{where} for a local path of that name")
    return _local(where)


def local_path(where: str | Path, remedy: str = "copy it to this machine, or mount it, and name that path") -> Path:
    """A place that must be a local path. Raises NoPlace for a URL, with `remedy` as its advice."""
    path = as_path(where)
    if is_remote(path):
        raise NoPlace(str(where), f"a URL, and only a path of this machine works here; {remedy}")
    return path


def stated_path(variable: str, remedy: str = "name a folder of this machine") -> Path | None:
    """The local folder in an environment variable; None if the variable is not set or empty."""
    return _stated(variable, lambda text: local_path(text, remedy))


def _stated(variable: str, read: Callable[[str], Path]) -> Path | None:
    stated = os.environ.get(variable, "")
    if not stated.strip():
        return None
    try:
        path = read(stated)
    except NoPlace as error:
        raise WrongVariable(variable, stated, error.reason) from None
    _check_folder(path, lambda reason: WrongVariable(variable, stated, reason))
    return path


def _check_folder(path: Path, wrong: Callable[[str], Exception]) -> None:
    if not is_remote(path) and path.exists() and not path.is_dir():
        raise wrong("a file, and a folder is needed; name one, or move the file away")


def artifacts_root() -> Path:
    """Where all artifacts are: `NFM_ARTIFACTS` (a folder or a URL of a bucket), else `artifacts/` in this folder."""
    if (root := _stated("NFM_ARTIFACTS", _root)) is not None:
        return root
    _check_folder(Path("artifacts"), lambda reason: NoPlace("artifacts", f"{reason}; or let NFM_ARTIFACTS name one"))
    return Path("artifacts")


def led_to(file: object) -> str:
    """` (NFM_ARTIFACTS=...)` for a message about a file to which that variable led; else nothing."""
    try:
        root = _stated("NFM_ARTIFACTS", _root)
    except WrongVariable:  # that is what the message is about
        return ""
    return f" (NFM_ARTIFACTS={root})" if root is not None and str(file).startswith(str(root)) else ""


def _root(text: str) -> Path:
    root = as_path(text)
    if not is_remote(root):
        return root
    if clouds.of(root) is None:
        raise NoPlace(text, f"artifacts are in a folder or at {clouds.PLACES}; elsewhere no lock can be kept")
    return as_path(str(root).rstrip("/"))


def cache_base() -> Path:
    """The folder of all local copies: `$NFM_CACHE`, else `nfm` in the user's cache folder."""
    return stated_path("NFM_CACHE") or (stated_path("XDG_CACHE_HOME") or Path.home() / ".cache") / "nfm"


def scratch_root() -> Path:
    """The folder where stages compute whose artifacts are in a bucket: `$NFM_SCRATCH`, else beside the local copies."""
    return stated_path("NFM_SCRATCH") or cache_base() / "scratch"


def stated_number(variable: str, unit: str, most: float) -> float | None:
    """The number from 0 to `most` in an environment variable; None if the variable is not set or empty."""
    stated = os.environ.get(variable, "").strip()
    if not stated:
        return None
    try:
        number = float(stated)
    except ValueError:
        number = math.nan
    if not 0 <= number <= most:
        raise WrongVariable(variable, stated, f"write a number of {unit} from 0 to {most:g}")
    return number


def patience() -> float:
    """Seconds for which a failing request is tried again: `NFM_PATIENCE`, else 60."""
    stated = stated_number("NFM_PATIENCE", "seconds", 86_400)
    return 60.0 if stated is None else stated


def answer_seconds() -> float:
    """Longest time for one request, so that two requests fit into the patience.

    At least 5 s, because a healthy but busy server may need that.
    """
    return max(5.0, min(60.0, patience() / 2))


def is_url(text: str) -> bool:
    """Whether a program wrote this text as a URL of something that is not local."""
    found = _SCHEMED.match(text)
    return found is not None and len(found["slashes"]) >= 2 and found["scheme"].lower() not in _FILES


def _of_a_program(where: Path) -> Path:
    """A path, unchanged. Refuses a URL in a Path: pathlib drops a slash, and it would name a folder `s3:`."""
    if is_remote(where):
        if holds_secret(str(where)):
            raise NoPlace(str(where), SECRETS)
    elif (found := _SCHEMED.match(str(where))) and found["slashes"] and found["scheme"] in _SCHEMES:
        raise NoPlace(str(where), "a pathlib.Path holds no URL; give the URL as a str")
    return where


def _local(text: str) -> Path:
    """A local path as the user wrote it. `~` and `~user` are home folders."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise NoPlace(text, f"there is no such user; write ./{text} for a local path of that name")
    path = Path(expanded)
    # Keep the `./`: workers, caches and manifests store the text, and without it the text would be read as a URL.
    first = path.parts[0] if path.parts else ""
    return path.absolute() if first[:1] == "~" or first[:1].isspace() or ":" in first else path


def _of_file_url(where: str, slashes: int, rest: str) -> Path:
    """The local path of a file: URL (RFC 8089: file:///path, file://localhost/path or file:/path), decoded."""
    host, _, path = rest.partition("/") if slashes == 2 and rest[:1] != "~" else ("", "", rest)
    decoded = os.fsdecode(unquote_to_bytes(path))
    if host.lower() not in ("", "localhost") or not decoded or "\0" in decoded:
        raise NoPlace(where, "names no path of this machine; write file:///path, or the path alone")
    return _local(decoded if decoded.startswith("~") else f"/{decoded}")


def _remote(where: str, scheme: str, rest: str) -> Path:
    """A URL as a path of universal_pathlib. Raises NoPlace if fsspec does not know the scheme."""
    import fsspec

    known = set(fsspec.available_protocols())
    if not known.issuperset(scheme.split("::")):
        near = difflib.get_close_matches(scheme, known, 1)
        meant = f" (did you mean {near[0]}://?)" if near else ""
        raise NoPlace(
            where,
            f"{scheme}:// is no known scheme{meant}; use a folder, {clouds.PLACES}, file:///path or another scheme "
            "that fsspec has here",
        )
    if scheme in clouds.CLOUDS and not rest.partition("/")[0].strip():
        raise NoPlace(where, f"names no bucket; write {scheme}://bucket/...")
    try:
        from upath import UPath

        cloud = clouds.CLOUDS.get(scheme)
        options = cloud.options(scheme, answer_seconds()) if cloud else {}
        return cast(Path, UPath(f"{scheme}://{rest}", use_listings_cache=False, **options))
    except ImportError as error:
        raise StorageError(f"{where}: {error}; URLs need the package universal_pathlib") from error
    except ValueError as error:
        raise NoPlace(where, f"{error}; use a folder, {clouds.PLACES}, or file:///path") from error


def is_remote(path: Any) -> bool:
    """Whether a path of `as_path` is on an object store, where files are written whole and cannot be mapped."""
    return not isinstance(path, Path)
