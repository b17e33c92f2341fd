"""Documents as text: what is read, what is not, and what is refused."""

import contextlib
import hashlib
import importlib
import io

import pytest

from memdlm.data import documents
from memdlm.data.documents import read_document, text_of_html
from memdlm.data.pages import text_of_page
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
        ("a.html", b'<meta charset="utf-8">caf\xe9', r"not in the encoding that it says, utf-8 \(byte 25\)"),
        ("a.html", b"<p>a\0b", "has a zero byte"),
        ("a.md", b"a\0b", r"is no text: it has a zero byte \(character 1\)"),
        ("a.txt", b"\xff\xfea", r"is not UTF-16 \(byte"),
        ("a.html", b"<script>x</script>", "has no text"),
        ("none.txt", None, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_document(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("<!DOCTYPE html><title>T</title><p>one<p>two", "T\none\ntwo"),
        ("<head><title>T</title><meta name=a><link rel=b>text at once", "T\ntext at once"),
        ("<html><head><script>no()</script><h1>H</h1>t", "H\nt"),
        ("<ul><li>a<ul><li>b</ul><li>c</ul>d", "a\nb\nc\nd"),
        ("<table><tr><td>a<td>b<tr><td>c</table>d", "a\nb\nc\nd"),
        ("<template><div><p>never</p></div></template>a<noscript><p>never</p></noscript>", "a"),
        ("<p>a<!-- <p>never --> b<![CDATA[never]]></p>", "a b"),
        (
            "<p>&lt;b&gt; &amp;amp; &hearts; &#x41; &bogus; &notit; &#xd83d;",
            "<b> &amp; \u2665 A &bogus; \u00acit; \ufffd",
        ),
        ("<pre>\n  a\n\n  b</pre>c  d", "  a\n  b\nc d"),
        ("<p>a<svg><title>never?</title><text>b</text></svg>c", "a\nnever?\nb\nc"),
        ("<b>a<i>b</b>c</i>d", "abcd"),
        ("a<br>b<br/>c</br>d", "a\nb\nc\nd"),
        ("<textarea><p>a</textarea><select><option>b<option>c</select>", "<p>a\nb\nc"),
        ("<div>" * 3000 + "deep", "deep"),
    ],
)
def test_pages_are_read_as_the_standard_says(source, expected):
    assert text_of_html(source) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("\ufeff<p>\u00e9".encode(), "\u00e9"),
        ("<p>\u00e9".encode("utf-16"), "\u00e9"),
        ("<p>\u00e9 \u20ac".encode(), "\u00e9 \u20ac"),
        ("<p>\u00e9 \u20ac".encode("cp1252"), "\u00e9 \u20ac"),
        (b"<p>a\x81b\xe9", "a\x81b\u00e9"),
        ("<meta charset=iso-8859-1><p>\u20ac".encode("cp1252"), "\u20ac"),
        ("<meta http-equiv=x content='text/html; charset=shift_jis'><p>\u3042".encode("cp932"), "\u3042"),
        ("<!-- <meta charset=koi8-r> --><p>\u00e9".encode(), "\u00e9"),
        ("<meta charset=utf-16><p>\u00e9".encode(), "\u00e9"),
        ("<p>charset=klingon \u00e9".encode(), "charset=klingon \u00e9"),
        ('<?xml version="1.0" encoding="iso-8859-1"?><p>\u00e9</p>'.encode("latin-1"), "\u00e9"),
        (b'<html xmlns="http://www.w3.org/1999/xhtml"><script src="a"/><p>a<![CDATA[<b>]]></p></html>', "a<b>"),
    ],
)
def test_a_page_says_its_encoding(data, expected):
    assert text_of_page(data, "a.html") == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_texts_with_a_byte_order_mark_are_read(encoding, tmp_path):
    (tmp_path / "a.rst").write_bytes("gr\u00fc\u00df\r\n\U0001f600".encode(encoding))
    assert read_document(tmp_path / "a.rst").text == "gr\u00fc\u00df\r\n\U0001f600"


@pytest.mark.parametrize("algorithm", ["AES-128", "AES-256-R5", "RC4-128"])
def test_an_encrypted_pdf_is_read_where_anyone_may_open_it(algorithm, tmp_path):
    pypdf = pytest.importorskip("pypdf")
    for name, password in (("open", ""), ("locked", "secret")):
        writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("the key is under the mat")))
        writer.encrypt(password, owner_password="owner", algorithm=algorithm)
        writer.write(tmp_path / f"{name}.pdf")
    assert read_document(tmp_path / "open.pdf").text.strip() == "the key is under the mat"
    with pytest.raises(DataError, match="locked with a password"):
        read_document(tmp_path / "locked.pdf")


def test_a_damaged_pdf_is_an_error_of_the_document(tmp_path):
    pytest.importorskip("pypdf")
    whole = pdf("the key is under the mat")
    for cut in range(0, len(whole), 7):
        for data in (whole[:cut], whole[:cut] + b"\xff<<[(" + whole[cut + 5 :]):
            (tmp_path / "a.pdf").write_bytes(data)
            # Read, or one line about it: errors of other classes fail the test.
            with contextlib.suppress(DataError):
                assert read_document(tmp_path / "a.pdf").text.strip()


def test_a_huge_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_BYTES", 10)
    (tmp_path / "a.txt").write_text("more than ten bytes")
    with pytest.raises(DataError, match=r"has 19 bytes; at most 10 are read"):
        read_document(tmp_path / "a.txt")
