"""Decode bytes strictly: an invalid byte is reported, never replaced."""

import codecs

from memdlm.errors import DataError

# Longer marks come first: the mark of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(data: bytes) -> str:
    """Return the encoding of a byte order mark, UTF-8 without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")


def decoded(data: bytes, what: str) -> str:
    """Decode a text file. Raises DataError for invalid bytes, naming the first, and for binary files."""
    name = encoding_of(data)
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not {name.removesuffix('-sig').upper()} (byte {error.start}); convert it first."
        ) from error
    if "\0" in text:
        raise DataError(f"{what} is no text: it has a zero byte (character {text.index(chr(0))}).")
    return text
