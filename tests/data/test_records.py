"""Rows from files: every format gives the same rows; whatever is wrong names the file and the row."""

import gzip
import json

import datasets
import pytest

from memdlm.data import read_records, write_jsonl
from memdlm.data.layouts import Columns, read_row
from memdlm.errors import DataError

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"messages": MESSAGES}, {"messages": MESSAGES[::-1]}]


def saved(kind, folder):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(ROWS, path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved", "splits"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
    assert read_records(saved(kind, tmp_path)) == ROWS


def test_prompt_and_response_become_messages(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n')
    assert read_records(path) == [{"messages": MESSAGES}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "", "x.jsonl' has no rows"),
        ("x.json", "", "x.json' has no rows"),
        ("x.jsonl", '{"messages": []}\n{"a": ', r"x.jsonl, line 2 is no JSON"),
        ("x.json", "{", "is no JSON"),
        ("x.json", "{}", "must hold a list of rows"),
        ("x.jsonl", '{"body": "a"}', r"row 0 has neither a list of 'messages' .* nor .*; it has: body\."),
        ("x.jsonl", "[1]", "line 1 holds a list, not an object"),
        ("x.txt", "a", "has suffix '.txt'; possible: .jsonl, .json, .parquet"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_row(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_a_missing_file_and_a_foreign_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no directory that `datasets` saved"):
        read_records(tmp_path)


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(ROWS, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_jsonl([ROWS[0], {"messages": object()}], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


TABLES = [
    ("x.csv", 'prompt,response,id\n"a, ""b""\nc",d,1\n\ne,f,2\n'),
    ("x.tsv", 'prompt\tresponse\tid\n"a, ""b""\nc"\td\t1\n\ne\tf\t2\n'),
    ("x.csv", 'prompt,response,id\r\n"a, ""b""\nc",d,1\r\ne,f,2'),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "text"), TABLES)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_tables_are_read_with_quoted_line_ends(name, text, encoding, is_compressed, tmp_path):
    data = text.encode(encoding)
    path = tmp_path / (f"{name}.gz" if is_compressed else name)
    path.write_bytes(gzip.compress(data, mtime=0) if is_compressed else data)
    found = [[message["content"] for message in row["messages"]] for row in read_records(path)]
    assert found == [['a, "b"\nc', "d"], ["e", "f"]]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_may_begin_with_a_byte_order_mark_and_be_compressed(kind, encoding, tmp_path):
    data = saved(kind, tmp_path).read_text().encode(encoding)
    (tmp_path / f"y.{kind}").write_bytes(data)
    (tmp_path / f"y.{kind}.gz").write_bytes(gzip.compress(data, mtime=0))
    assert read_records(tmp_path / f"y.{kind}") == read_records(tmp_path / f"y.{kind}.gz") == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.csv", b"prompt,response\na\n", r"line 2 has 1 fields, but the header has 2 \(prompt, response\)"),
        ("x.csv", b"prompt,prompt\na,b\n", "the header has an empty or repeated name: 'prompt'"),
        ("x.csv", b'prompt,response\n"a,b\n', "is no row of a table"),
        ("x.csv", b"prompt,response\na,\xff\n", r"is not UTF-8 \(byte 18\)"),
        ("x.csv", b"prompt,response\na,\0\n", "has a zero byte"),
        ("x.csv", b"prompt,response\n", "has no rows"),
        ("x.jsonl.gz", b"no gzip", "is no gzip file"),
        ("x.jsonl.gz", gzip.compress(b"{}\n", mtime=0)[:-9], "is no gzip file"),
        ("x.parquet", b"PAR1", "is no Parquet file"),
        ("x.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("x.jsonl.zst", b"x", r"has suffix '\.zst'"),
        ("x.jsnl", b"x", r"Did you mean '\.jsonl'"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_a_column_of_the_conversation_is_no_context():
    for row, name in (
        ({"messages": ROWS[0]["messages"], "document": "a"}, "messages"),
        ({"prompt": "a", "response": "b", "document": "c"}, "response"),
    ):
        with pytest.raises(DataError, match=f"row 0: context_column='{name}' is a column of the conversation itself"):
            read_row(row, "row 0", Columns(context=name))
