"""Secrets of URLs are hidden wherever the URL stands, and nothing else of a text changes."""

from __future__ import annotations

import pickle
import time

import pytest

from nfm.storage.errors import CorruptShard, NoPlace, StorageError, WrongVariable
from nfm.storage.errors.masked import HIDDEN, holds_secret, masked, masked_in

SECRET = [
    ("s3://key:secret@host/x", f"s3://{HIDDEN}@host/x"),
    ("S3://key:secret@host/x", f"S3://{HIDDEN}@host/x"),
    ("s3://key:sec/ret+a=@host/x", f"s3://{HIDDEN}@host/x"),  # AWS's secrets may hold slashes
    ("s3://key:sec?ret@host/x", f"s3://{HIDDEN}@host/x"),
    ("s3://key:se'cret@host/x", f"s3://{HIDDEN}@host/x"),
    ("s3://key:123/secret@host/x", f"s3://{HIDDEN}@host/x"),
    ("s3://key:secret", f"s3://{HIDDEN}"),
    ("s3:/key:secret@host/x", f"s3:/{HIDDEN}@host/x"),
    ("s3:key:secret@host/x", f"s3:{HIDDEN}@host/x"),
    ("simplecache::s3://key:secret@host/x", f"simplecache::s3://{HIDDEN}@host/x"),
    ("https://secret@host/x", f"https://{HIDDEN}@host/x"),
    ("http://user:secret@127.0.0.1:80/x", f"http://{HIDDEN}@127.0.0.1:80/x"),
    ("ray://user:secret@head:10001", f"ray://{HIDDEN}@head:10001"),
    ("abfs://box:secret@account/x", f"abfs://{HIDDEN}@account/x"),
    ("s3://b/x?X-Amz-Signature=secret&partNumber=1", f"s3://b/x?X-Amz-Signature={HIDDEN}&partNumber=1"),
    ("https://h/x?sv=1&sig=secret%3D&se=2", f"https://h/x?sv=1&sig={HIDDEN}&se=2"),
    ("https://h/x?token=secret", f"https://h/x?token={HIDDEN}"),
    ("https://h/x?AWSAccessKeyId=secret", f"https://h/x?AWSAccessKeyId={HIDDEN}"),
    ("https://h/x#access_token=secret", f"https://h/x#access_token={HIDDEN}"),
    ("https://h/x?next=s3://key:secret@host/y", f"https://h/x?next=s3://{HIDDEN}@host/y"),
]
OPEN = [
    "s3://bucket/a@b:c/key=1", "s3://bucket: no such bucket", "s3://arn:aws:s3:eu:1:accesspoint/x", "memory://a:b/c",
    "http://127.0.0.1:8265, or", "'http://host:80'", "http://[fe80::1]:80/x", "hdfs://user@host:9000/x",
    "abfs://box@account/x", "https://site/@user/post", "s3://b/x?versionId=1&prefix=a", "C:/Users/a:b@c", "D:\\x:y@z",
    "file:///home/a@b/x", "/data/x?key=3", "a:b@c", "10.0.0.1:6379", "module:function", "cannot read: x", "",
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), SECRET)
def test_a_secret_is_hidden_wherever_its_url_stands(text: str, shown: str) -> None:
    for before, after in (("", ""), ("'", "'"), ("NFM_ARTIFACTS=", ": bad"), ("a http://h:1/x ", ", b@c"), ("(", ")")):
        assert "secret" not in masked(f"{before}{text}{after}")
    assert masked(text) == shown
    assert masked(shown) == shown
    assert holds_secret(text)
    assert not holds_secret(shown)


@pytest.mark.parametrize("text", OPEN)
def test_text_without_a_secret_is_not_changed(text: str) -> None:
    assert masked(text) == text
    assert masked(f"{text} {text}") == f"{text} {text}"


def test_values_are_masked_in_all_their_texts() -> None:
    value = {"a": ["s3://k:s@h/x", 1, None], "s3://k:s@h": ("x", {"b": "s3://k:s@h"}), "n": 1.5}
    hidden = f"s3://{HIDDEN}@h"
    assert masked_in(value) == {"a": [f"{hidden}/x", 1, None], hidden: ("x", {"b": hidden}), "n": 1.5}


def test_an_error_shows_no_secret_in_text_repr_and_pickle() -> None:
    for error in (StorageError("s3://k:secret@h/x: bad"), CorruptShard("s3://k:secret@h: bad"),
                  NoPlace("s3://k:secret@h/x", "no place, as https://secret@h is none"),
                      WrongVariable("X", "s3://k:secret@h/x", "no place, as https://secret@h is none")):  # fmt: skip
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        for text in (str(error), repr(error), str(copy), repr(vars(error)), pickle.dumps(error).decode("latin-1")):
            assert "secret" not in text
        assert HIDDEN in str(error)


@pytest.mark.parametrize("piece", ["ab:/", "a.", "a", "s3:", "s3://k:", "s3://k:s@", "x://?key=", "ab::"])
def test_hostile_text_costs_little(piece: str) -> None:
    began = time.process_time()
    masked(piece * (50_000 // len(piece)))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("value", [float("nan"), [float("nan")], {"eta": float("nan")}, None, 1, "nan"])
def test_values_that_are_not_text_hold_no_secret(value: object) -> None:
    assert not holds_secret(value)
