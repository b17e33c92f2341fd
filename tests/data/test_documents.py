"""Documents as text: what is read, what is not, and what is refused."""

import hashlib
import importlib

import pytest

from memdlm.data.documents import read_document, text_of_html
from memdlm.errors import DataError

PAGE = """<!doctype html><html><head><title>On &amp; off</title><style>p {color: red}</style>
<script>var hidden = "<p>never</p>";</script></head><body><h1>A <em>title</em></h1>
<p>One
   line, <b>bold</b>&nbsp;and <a href="x">linked</a>.<br>Next<!-- no comment -->.</p><ul><li>first<li>second</ul>
<template><p>never</p></template><noscript>never</noscript>
<pre>def f():
    return 1
</pre><table><tr><td>a</td><td>b</td></tr></table></body></html>"""


def pdf(text):
    """A PDF of one page, written by hand: five objects and a cross-reference table."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 6\n0000000000 65535 f \n%strailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(out),
    )


def test_text_and_markdown_are_read_as_they_are(tmp_path):
    for name in ("a.txt", "a.md", "A.MD"):
        path = tmp_path / name
        path.write_bytes("\ufeff# Gr\u00fc\u00dfe\n\n* one\n".encode())
        found = read_document(path)
        assert found.text == "# Gr\u00fc\u00dfe\n\n* one\n"
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.path == str(path)


def test_of_html_the_visible_text_is_read(tmp_path):
    expected = "On & off\nA title\nOne line, bold and linked.\nNext.\nfirst\nsecond\ndef f():\n    return 1\na\nb"
    assert text_of_html(PAGE) == expected
    (tmp_path / "a.html").write_text(PAGE)
    assert read_document(tmp_path / "a.html").text == expected
    (tmp_path / "b.htm").write_bytes('<meta charset="latin-1"><p>Gr\u00fc\u00dfe'.encode("latin-1"))
    assert read_document(tmp_path / "b.htm").text == "Gr\u00fc\u00dfe"
    assert text_of_html("<head><meta name=a><body>x") == "x"
    assert text_of_html("</style>a</p> b < c") == "a\nb < c"


def test_of_a_pdf_the_text_layer_is_read(tmp_path, monkeypatch):
    pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(pdf("the key is under the mat"))
    assert read_document(tmp_path / "a.pdf").text.strip() == "the key is under the mat"
    (tmp_path / "empty.pdf").write_bytes(pdf(""))
    with pytest.raises(DataError, match=r"has no text\. A scanned PDF"):
        read_document(tmp_path / "empty.pdf")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing more")
    with pytest.raises(DataError, match="is no PDF that can be read"):
        read_document(tmp_path / "broken.pdf")
    real = importlib.import_module

    def without(name):
        if name == "pypdf":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(DataError, match=r"pip install 'memdlm\[pdf\]'"):
        read_document(tmp_path / "a.pdf")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"x", r"suffix '.docx'; possible: .txt, .text, .md"),
        ("a.htlm", b"x", "Did you mean '.htm'"),
        ("a.txt", b"  \n", "has no text"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 \(byte 3\)"),
        ("a.html", b'<meta charset="klingon">x', "not in the encoding that it says"),
        ("a.html", b"<script>x</script>", "has no text"),
        ("none.txt", None, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_document(tmp_path / name)
