"""Hides secrets in URLs: `***` replaces them in everything that is printed or written.

A URL may have a key before its host (`s3://KEY:SECRET@bucket/x`) or in its query (`?X-Amz-Signature=`, `?token=`).
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az")  # a bucket name has no colon, so a colon belongs to a key
# A single name before the host is a secret (https://TOKEN@host), but with these schemes it is a container or a user.
_NAMES_USERS = ("abfs", "abfss", "wasb", "wasbs", "hdfs", "webhdfs", "sftp", "ssh", "git", "ftp", "smb", "file")
_LEAD = r"\b(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{1,30}):"
_URL = re.compile(rf"(?:{_LEAD}/+|\b(?P<bare>s3a?|gcs|gs|az):(?!/))(?P<authority>[^/?#\s'\"]*)", re.IGNORECASE)
_SPACE = re.compile(r"\s")
_WHOLE = re.compile(rf"{_LEAD}/+\S*")
_QUERY = re.compile(
    r"([?&;#][\w.%-]*(?:signature|sig|token|secret|passw|pwd|credential|key|auth|accessid)[\w.%-]*=)[^?&;#\s'\"]+",
    re.IGNORECASE,
)
_CLOSING = ".,:;)]}>"


def masked(text: str) -> str:
    """The text with `***` in place of every secret in its URLs, also in URLs that lack a slash."""
    parts, at = [], 0
    token_end = at_sign = 0
    while url := _URL.search(text, at):
        start, end = url.span("authority")
        shown = _authority((url["scheme"] or url["bare"]).lower(), url["authority"])
        if shown is None:  # the password contains a slash or a quote: it ends at the last @
            if end >= token_end:
                token_end = len(text) if (space := _SPACE.search(text, end)) is None else space.start()
                at_sign = text.rfind("@", end, token_end)
            shown, end = (f"{HIDDEN}@", at_sign + 1) if at_sign >= end else (HIDDEN, end)
        parts += [text[at:start], shown]
        at = end
    return _WHOLE.sub(lambda found: _QUERY.sub(rf"\1{HIDDEN}", found[0]), "".join(parts) + text[at:])


def masked_in(value: Any) -> Any:
    """Applies `masked` to every text in a JSON value. Other values are returned unchanged."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {masked_in(key): masked_in(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(masked_in, value))
    return value


def holds_secret(value: Any) -> bool:
    """Whether the text, or any text in the value, has a URL with a key, a password or a token."""
    if isinstance(value, str):
        return masked(value) != value
    if isinstance(value, dict):
        return any(holds_secret(key) or holds_secret(one) for key, one in value.items())
    return isinstance(value, list | tuple) and any(map(holds_secret, value))


def _authority(scheme: str, authority: str) -> str | None:
    """The part between `//` and the path, without secrets; None if it is the beginning of a password."""
    user, at, host = authority.rpartition("@")
    if at:
        return authority if ":" not in user and scheme in _NAMES_USERS else f"{HIDDEN}@{host}"
    plain = authority.rstrip(_CLOSING)
    if plain.startswith(("[", "arn:")) or scheme in ("file", "local", "memory"):
        return authority
    _, colon, port = plain.partition(":")
    return None if colon and (scheme in _OBJECT_STORES or not port.isdigit()) else authority
