"""Documents as plain text: text, Markdown, HTML and PDF files."""

import hashlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm.data.pages import text_of_html, text_of_page
from memdlm.data.texts import decoded
from memdlm.errors import DataError, did_you_mean
from memdlm.templates import check_text, text_ids

__all__ = ["READERS", "Document", "plain_ids", "read_document", "text_of_html"]
MOST_BYTES = 2**30
"""Larger files are refused before they are read: no memory can hold them, and most machines cannot parse them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A file's text."""

    path: str
    """Absolute path."""
    text: str
    sha256: str
    """SHA-256 of the file's bytes."""


def read_document(path: str | Path) -> Document:
    """Read a document: plain text (.txt, .md, .rst, .csv, ...), .html, .htm, .xhtml or .pdf (needs pypdf).

    Plain text is kept as it is; it must be UTF-8, or UTF-16 or UTF-32 with a byte order mark. HTML gives its visible
    text, PDF its text layer, page by page. Raises DataError when the file does not exist, has another suffix, is larger
    than MOST_BYTES, is damaged or locked with a password, or has no text.
    """
    path = Path(path)
    what = f"document: {str(path)!r}"
    if not path.is_file():
        raise DataError(f"{what} does not exist, or is a folder.")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{what} has suffix {path.suffix!r}; possible: {', '.join(READERS)}.{did_you_mean(suffix, READERS)}"
        )
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{what} has {size:,} bytes; at most {MOST_BYTES:,} are read. Split it.")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error.strerror or error}.") from error
    text = READERS[suffix](data, what)
    if not text.strip():
        hint = " A scanned PDF has pictures instead of text; run it through OCR first." if suffix == ".pdf" else ""
        raise DataError(f"{what} has no text.{hint}")
    check_text(text, f"{what}: ")
    return Document(path=str(path.absolute()), text=text, sha256=hashlib.sha256(data).hexdigest())


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text literally: <|mask|> or an end of text in it are words, not control tokens."""
    return text_ids(tokenizer, text)


def _pdf(data: bytes, what: str) -> str:
    try:
        pypdf: Any = importlib.import_module("pypdf")
    except ModuleNotFoundError as error:
        raise DataError(
            "document: reading PDF needs pypdf: pip install 'memdlm[pdf]', or convert the document to text."
        ) from error
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        # A PDF that is encrypted only for its permissions has an empty password.
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(f"{what} is locked with a password; save it without one first.")
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except DataError:
        raise
    except pypdf.errors.DependencyError as error:
        raise DataError(f"{what} is encrypted: pip install 'memdlm[pdf]' to read it ({error}).") from error
    except Exception as error:  # on damaged files pypdf raises errors of any class
        raise DataError(f"{what} is no PDF that can be read: {type(error).__name__}: {error}") from error


READERS: dict[str, Callable[[bytes, str], str]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".csv", ".tsv"), decoded),
    **dict.fromkeys((".html", ".htm", ".xhtml"), text_of_page),
    ".pdf": _pdf,
}
"""By suffix: what turns (bytes, the file's name for messages) into text."""
