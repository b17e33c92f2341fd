"""Rows from files: every format gives the same rows; whatever is wrong names the file and the row."""

import json

import datasets
import pytest

from memdlm.data import read_records, write_jsonl
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
        ("x.jsonl", '{"body": "a"}', r"row 0: .* neither a list of 'messages' .* nor .*; it has: body\."),
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
