"""Secrets in URLs: whatever is printed or written has `***` in their place.

A URL may carry a key before its host (`s3://KEY:SECRET@bucket/x`) or in its query (`?X-Amz-Signature=`, `?token=`).
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs")  # no bucket has a colon, so one is of a key
# A name alone before the host is a secret (https://TOKEN@host), but of these it is a container's or a user's.
_NAMES_USERS = ("abfs", "abfss", "wasb", "wasbs", "hdfs", "webhdfs", "sftp", "ssh", "git", "ftp", "smb", "file")
_LEAD = r"\b(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{1,30}):"
_URL = re.compile(rf"(?:{_LEAD}/+|\b(?P<bare>s3a?|gcs|gs):(?!/))(?P<authority>[^/?#\s'\"]*)", re.IGNORECASE)
_SPACE = re.compile(r"\s")
_WHOLE = re.compile(rf"{_LEAD}/+\S*")
_QUERY = re.compile(
    r"([?&;#][\w.%-]*(?:signature|sig|token|secret|passw|pwd|credential|key|auth|accessid)[\w.%-]*=)[^?&;#\s'\"]+",
    re.IGNORECASE,
)
_CLOSING = ".,:;)]}>"


def masked(text: str) -> str:
    """The text with `***` for every secret of the URLs in it, also of those that lack a slash."""
    parts, at = [], 0
    token_end = at_sign = 0
    while url := _URL.search(text, at):
        start, end = url.span("authority")
        shown = _authority((url["scheme"] or url["bare"]).lower(), url["authority"])
        if shown is None:  # a password goes on behind a slash or a quote, up to the last @
            if end >= token_end:
                token_end = len(text) if (space := _SPACE.search(text, end)) is None else space.start()
                at_sign = text.rfind("@", end, token_end)
            shown, end = (f"{HIDDEN}@", at_sign + 1) if at_sign >= end else (HIDDEN, end)
        parts += [text[at:start], shown]
        at = end
    return _WHOLE.sub(lambda found: _QUERY.sub(rf"\1{HIDDEN}", found[0]), "".join(parts) + text[at:])


def masked_in(value: Any) -> Any:
    """The same of every text in a value of JSON's kinds; another value as it is."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {masked_in(key): masked_in(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(masked_in, value))
    return value


def holds_secret(value: Any) -> bool:
    """Whether a URL in the text, or in any text of the value, carries a key, a password or a token."""
    if isinstance(value, str):
        return masked(value) != value
    if isinstance(value, dict):
        return any(holds_secret(key) or holds_secret(one) for key, one in value.items())
    return isinstance(value, list | tuple) and any(map(holds_secret, value))


def _authority(scheme: str, authority: str) -> str | None:
    """What may be shown of the part between `//` and the path; None where it is the beginning of a password."""
    user, at, host = authority.rpartition("@")
    if at:
        return authority if ":" not in user and scheme in _NAMES_USERS else f"{HIDDEN}@{host}"
    plain = authority.rstrip(_CLOSING)
    if plain.startswith(("[", "arn:")) or scheme in ("file", "local", "memory"):
        return authority
    _, colon, port = plain.partition(":")
    return None if colon and (scheme in _OBJECT_STORES or not port.isdigit()) else authority
