"""Messages can be printed with any file name in them."""

from __future__ import annotations

import pytest

from nfm.storage.errors import NoPlace, StorageError, is_utf8, legible


@pytest.mark.parametrize("name", [bytes([byte]) for byte in range(0x80, 0x100)] + [b"caf\xe9/\xff", b"\xed\xb3\xa9"])
def test_a_message_shows_every_unusual_byte_of_a_name(name: bytes) -> None:
    text = name.decode("utf-8", "surrogateescape")
    told = name.decode("utf-8", "backslashreplace")
    assert not is_utf8(text)
    assert legible(text) == str(StorageError(text)) == told
    assert str(StorageError(f"{text!r} is odd")) == f"'{told}' is odd"
    assert told.isascii()


@pytest.mark.parametrize("name", ["plain", "Größe, 大 🙂", "", "a\tb", "\\xe9", "\\ud800"])
def test_other_names_are_left_alone(name: str) -> None:
    assert is_utf8(name)
    assert legible(name) == str(StorageError(name)) == name


def test_half_a_character_of_no_byte_can_be_printed_too() -> None:
    assert str(StorageError("\ud800")) == r"\ud800"


def test_a_message_shows_every_byte_of_a_path() -> None:
    assert r"caf\xe9" in str(NoPlace("caf\udce9", "is none"))
