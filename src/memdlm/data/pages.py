"""The visible text of HTML pages. html5lib builds the tree by the standard; this module decides what is text."""

import codecs
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import html5lib
import webencodings

from memdlm.data.texts import BYTE_ORDER_MARKS
from memdlm.errors import DataError

HIDDEN = {"script", "style", "template", "noscript", "head", "iframe", "noframes", "noembed"}
"""Elements whose content is not read; a page's title, inside head, is."""
INLINE = {
    *("a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "i", "ins", "kbd", "label", "mark"),
    *("q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "u", "var", "wbr", "font", "tt"),
}
"""Elements inside a line of text; all others end the line."""
SNIFFED = 1024
"""Number of bytes at the start of a page that are searched for its encoding."""
LABEL = re.compile(rb"<(?:meta[^>]*?charset|\?xml[^>]*?encoding)\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)
XHTML = b"http://www.w3.org/1999/xhtml"


def text_of_html(source: str | bytes) -> str:
    """Return the visible text of a page: one line per block, spaces collapsed except inside <pre>."""
    return _visible(html5lib.parse(source, namespaceHTMLElements=False))


def text_of_page(data: bytes, what: str) -> str:
    """Return the visible text of a page's bytes.

    The encoding is that of a byte order mark or a <meta>. Without either it is UTF-8 if the bytes are valid UTF-8, as
    in browsers, else Windows-1252, the standard's default. Well-formed XHTML is read as XML. Raises DataError, which
    names `what`, when the bytes are not in the declared encoding, and for an unknown encoding.
    """
    start = data[:SNIFFED]
    if start.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"<?xml") or XHTML in start:
        try:
            return _visible(ElementTree.fromstring(data))
        except (ElementTree.ParseError, ValueError, LookupError):
            pass  # as in browsers: XHTML that is not well-formed is read as HTML
    name = _encoding(data, what)
    try:
        # In the standard's Windows-1252 every byte is a character; in Python's, five bytes are none.
        text = data.decode(name, "surrogateescape" if name == "windows-1252" else "strict")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what} is not in the encoding that it says, {name.removesuffix('-sig')} (byte {error.start})."
        ) from error
    if "\0" in text:
        raise DataError(f"{what} is no page: it has a zero byte (character {text.index(chr(0))}).")
    return text_of_html("".join(chr(ord(each) - 0xDC00) if "\udc80" <= each <= "\udcff" else each for each in text))


def _encoding(data: bytes, what: str) -> str:
    marked = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if marked is not None:
        return marked
    said = LABEL.search(re.sub(rb"<!--.*?(-->|\Z)", b"", data[:SNIFFED], flags=re.DOTALL))
    if said is not None:
        label = said[1].decode("ascii", "replace")
        try:
            codecs.lookup(_python_name(label))
        except LookupError as error:
            raise DataError(f"{what} is not in the encoding that it says: {label!r} is not known.") from error
        return _python_name(label)
    try:
        data.decode()
    except UnicodeDecodeError:
        return "windows-1252"
    return "utf-8"


def _python_name(label: str) -> str:
    """Return Python's name for a label. By the standard, Latin-1 means Windows-1252, and UTF-16 means UTF-8 here."""
    known = webencodings.lookup(label)
    if known is None:
        return label
    return "utf-8" if known.name.startswith("utf-16") else known.name


def _visible(root: ElementTree.Element) -> str:
    lines: list[str] = []
    line, preformatted = "", 0
    for kind, value in [*_events(root), ("end", "html")]:
        if kind == "text":
            line += value
        elif value not in INLINE:
            found = line.rstrip("\n").split("\n") if preformatted else [" ".join(line.split())]
            lines += [each.rstrip() for each in found if each.strip()]
            line = ""
        if value == "pre" and kind != "text":
            preformatted += 1 if kind == "start" else -1
    return "\n".join(lines)


def _events(root: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Yield ("start", tag), ("text", text) and ("end", tag) in the order of the page, without hidden elements.

    There is no recursion, because pages can be nested deeper than Python's stack.
    """
    waiting: list[ElementTree.Element | tuple[str, str]] = [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, tuple):
            yield item
        elif isinstance(item.tag, str):  # the tag of a comment is a function
            tag = item.tag.rpartition("}")[2].lower()
            yield "start", tag
            waiting.append(("end", tag))
            is_head = tag == "head"
            if tag in HIDDEN and not is_head:
                continue
            for child in reversed(item):
                if child.tail and not is_head:
                    waiting.append(("text", child.tail))
                if not is_head or str(child.tag).endswith("title"):
                    waiting.append(child)
            if item.text and not is_head:
                waiting.append(("text", item.text))
