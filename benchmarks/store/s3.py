"""A small S3 server in memory for `benchmarks.store.bucket`, which counts requests and answers after a delay.

moto, which the tests use, does far more for a request than this: its own time would be a part of what is measured.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
import time
from collections import Counter
from email.utils import formatdate
from urllib.parse import quote
from xml.sax.saxutils import escape

from aiohttp import web

PAGE = 1000  # keys that a listing tells at a time


class Objects:
    """Objects by key, conditional puts as S3 has them, and what was asked."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.held: dict[str, tuple[bytes, str, float]] = {}  # data, tag, Unix time
        self.asked: Counter[str] = Counter()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/-/asked":  # no object store has this: what was asked since the last time
            told, self.asked = dict(self.asked), Counter()
            return web.json_response(told)
        body = await request.read()
        key = request.path.lstrip("/")
        listing = "/" not in key.rstrip("/") and request.method == "GET"
        self.asked["LIST" if listing else request.method] += 1
        await asyncio.sleep(self.delay)
        if "/" not in key.rstrip("/"):
            return self._list(key.rstrip("/"), request) if listing else web.Response()
        return getattr(self, f"_{request.method.lower()}")(key, request, body)

    def _put(self, key: str, request: web.Request, body: bytes) -> web.Response:
        found, wanted = self.held.get(key), request.headers.get("If-Match")
        if wanted is not None and found is None:
            return _error(404, "NoSuchKey")
        if (wanted and found and found[1] != wanted) or (request.headers.get("If-None-Match") == "*" and found):
            return _error(412, "PreconditionFailed")
        if "aws-chunked" in request.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        self.held[key] = body, tag, time.time()
        return web.Response(headers={"ETag": tag})

    def _get(self, key: str, request: web.Request, _: bytes) -> web.Response:
        if key not in self.held:
            return _error(404, "NoSuchKey")
        data, tag, changed = self.held[key]
        headers = {"ETag": tag, "Last-Modified": formatdate(changed, usegmt=True), "Date": formatdate(usegmt=True)}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(data))})
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if span is None:
            return web.Response(body=data, headers=headers)
        first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return _error(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return web.Response(status=206, body=data[first : last + 1], headers=headers)

    _head = _get

    def _delete(self, key: str, *_: object) -> web.Response:
        self.held.pop(key, None)
        return web.Response(status=204)

    def _list(self, bucket: str, request: web.Request) -> web.Response:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        most = min(int(request.query.get("max-keys", PAGE)), PAGE)
        found: dict[str, tuple[bytes, str, float] | None] = {}
        after, more = request.query.get("continuation-token", ""), ""
        for whole in sorted(self.held):
            key = whole.removeprefix(f"{bucket}/")
            if not whole.startswith(f"{bucket}/{prefix}"):
                continue
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            name = key if end < 0 else key[: end + 1]
            if name <= after or name in found:
                continue
            if len(found) == most:
                more = max(found)
                break
            found[name] = self.held[whole] if end < 0 else None
        rows = [_row(name, facts) for name, facts in found.items()]
        token = f"<NextContinuationToken>{escape(more)}</NextContinuationToken>" if more else ""
        cut = str(bool(more)).lower()
        text = (
            f"<ListBucketResult><Name>{bucket}</Name><EncodingType>url</EncodingType><KeyCount>{len(rows)}</KeyCount>"
            f"<IsTruncated>{cut}</IsTruncated>{token}{''.join(rows)}</ListBucketResult>"
        )
        return web.Response(body=text.encode(), content_type="application/xml")


def _row(name: str, facts: tuple[bytes, str, float] | None) -> str:
    if facts is None:
        return f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>"
    data, tag, changed = facts
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed))
    return (
        f"<Contents><Key>{quote(name)}</Key><LastModified>{at}</LastModified><ETag>{escape(tag)}</ETag>"
        f"<Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def _error(status: int, code: str) -> web.Response:
    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, body=text.encode(), content_type="application/xml")


def _unchunked(body: bytes) -> bytes:
    """The data of a body in chunks, each after its length in hex."""
    parts = []
    while body:
        line, _, rest = body.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        parts.append(rest[:size])
        body = rest[size + 2 :]
    return b"".join(parts)


async def serve(delay: float) -> None:
    """Prints the port, and answers until standard input ends."""
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", Objects(delay).answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
