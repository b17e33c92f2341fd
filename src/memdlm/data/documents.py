"""Documents as plain text: text, Markdown, HTML and PDF files."""

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from memdlm.errors import DataError, did_you_mean

HIDDEN = {"script", "style", "template", "noscript", "head"}
"""Elements whose content is not read, except a page's title."""
INLINE = {
    *("a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "i", "ins", "kbd", "label", "mark"),
    *("q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "u", "var", "wbr", "font", "tt"),
}
"""Elements inside a line of text; all others end it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A file's text."""

    path: str
    """Absolute."""
    text: str
    sha256: str
    """Of the file's bytes."""


def read_document(path: str | Path) -> Document:
    """Read a document: .txt, .text, .md, .markdown, .html, .htm, .xhtml or .pdf (needs pypdf).

    Markdown stays as it is; of HTML the visible text is read, of a PDF its text layer, page after page. Raises
    DataError when there is no such file, its suffix is another, it is damaged, or it has no text.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"document: {str(path)!r} does not exist, or is a folder.")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"document: {str(path)!r} has suffix {path.suffix!r}; possible: {', '.join(READERS)}."
            f"{did_you_mean(suffix, READERS)}"
        )
    text = READERS[suffix](path)
    if not text.strip():
        hint = " A scanned PDF has pictures instead of text; run it through OCR first." if suffix == ".pdf" else ""
        raise DataError(f"document: {str(path)!r} has no text.{hint}")
    return Document(path=str(path.absolute()), text=text, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text as itself: where it mentions <|mask|> or an end of text, it means the words, not the tokens."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def text_of_html(source: str) -> str:
    """Return the visible text of a page: one line per block, spaces collapsed except inside <pre>."""
    reader = _Visible()
    reader.feed(source)
    reader.close()
    return reader.text()


@final
class _Visible(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = []
        self._line = ""
        self._hidden: list[str] = []
        self._titles = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":  # ends a <head> that was left open
            self._hidden.clear()
        if tag in HIDDEN:
            self._hidden.append(tag)
        if tag not in INLINE:
            self._end_line()
        self._titles += tag == "title"
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            # What was opened inside and never closed ends with it.
            del self._hidden[len(self._hidden) - 1 - self._hidden[::-1].index(tag) :]
        if tag not in INLINE:
            self._end_line()
        self._titles -= tag == "title" and self._titles > 0
        self._preformatted -= tag == "pre" and self._preformatted > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden or (self._hidden == ["head"] and self._titles):
            self._line += data

    def text(self) -> str:
        self._end_line()
        return "\n".join(self._lines)

    def _end_line(self) -> None:
        lines = self._line.rstrip("\n").split("\n") if self._preformatted else [" ".join(self._line.split())]
        self._lines += [line.rstrip() for line in lines if line.strip()]
        self._line = ""


def _plain(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"document: {str(path)!r} is not UTF-8 (byte {error.start}); convert it first.") from error


def _html(path: Path) -> str:
    source = path.read_bytes()
    named = re.search(rb"charset\s*=\s*[\"']?\s*([\w-]+)", source[:2048])
    try:
        return text_of_html(source.decode(named[1].decode() if named else "utf-8-sig"))
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(f"document: {str(path)!r} is not in the encoding that it says: {error}") from error


def _pdf(path: Path) -> str:
    try:
        pypdf: Any = importlib.import_module("pypdf")
    except ModuleNotFoundError as error:
        raise DataError(
            "document: reading PDF needs pypdf: pip install 'memdlm[pdf]', or convert the document to text."
        ) from error
    try:
        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
    except (pypdf.errors.PyPdfError, ValueError, KeyError) as error:
        raise DataError(f"document: {str(path)!r} is no PDF that can be read: {error}") from error


READERS: dict[str, Callable[[Path], str]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown"), _plain),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _html),
    ".pdf": _pdf,
}
"""How each suffix is read."""
