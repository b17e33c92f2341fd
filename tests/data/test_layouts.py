"""Layouts of rows: what each becomes, which columns are used, and which are refused by name."""

import pytest

from memdlm.data.encoding import EncodingOptions, encode_all
from memdlm.data.layouts import Columns, parse_column_map, to_conversation
from memdlm.data.records import write_jsonl
from memdlm.data.sources import load_conversations
from memdlm.errors import ConfigError, DataError


def jsonl(path, rows):
    write_jsonl(rows, path)
    return str(path)


def said(row, **columns):
    """The messages of a row, as (role, content)."""
    read = to_conversation(row, "d.jsonl, row 0", Columns(**columns))
    return [(message["role"], message["content"]) for message in read["messages"]]


ASKED = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "response": "a"}, ASKED),
        ({"question": "q", "answer": "a"}, ASKED),
        ({"query": "q", "response": "a", "id": 3}, ASKED),
        ({"prompt": "q", "completion": "a"}, ASKED),
        ({"input": "q", "output": "a"}, ASKED),
        ({"instruction": "q ", "input": "", "output": " a"}, ASKED),
        ({"instruction": "q", "input": "i", "output": "a"}, [("user", "q\n\ni"), ASKED[1]]),
        ({"question": "q", "context": "c", "answer": "a"}, [("user", "c\n\nq"), ASKED[1]]),
        ({"dialog": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ASKED),
        ({"conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
        ({"messages": [{"from": "User", "value": "q"}, {"from": "bot", "value": "a"}]}, ASKED),
        ({"conversations": '[{"from": "human", "value": "q"}, {"from": "model", "value": "a"}]'}, ASKED),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, ASKED),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, ASKED),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), *ASKED]),
        ({"system": "", "history": None, "prompt": "q", "response": "a", "tools": []}, ASKED),
        ({"system": "s", "conversations": [{"from": "human", "value": "q"}]}, [("system", "s"), ASKED[0]]),
        ({"history": [["q1", "a1"]], "prompt": "q", "response": "a"}, [("user", "q1"), ("assistant", "a1"), *ASKED]),
        ({"history": [{"role": "user", "content": "h"}], "query": "q", "answer": "a"}, [("user", "h"), *ASKED]),
        ({"messages": [{"role": "user", "content": "q"}], "prompt": "x", "prompt_id": 1}, ASKED[:1]),
    ],
)
def test_a_row_of_a_known_layout_becomes_messages(row, expected):
    assert said(row) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chosen": "x", "rejected": "y"}, "column 'chosen' is not used: preferences are not learned here"),
        ({"label": False}, "column 'label' is not used"),
        ({"images": ["x.png"]}, "column 'images' is not used: only text"),
        ({"documents": ["x"]}, "column 'documents' is not used"),
        ({"reasoning_content": "x"}, "column 'reasoning_content' is not used"),
        ({"thinking": "x"}, "column 'thinking' is not used"),
        ({"tool_calls": [{"function": {"name": "f"}}]}, "column 'tool_calls' is not used"),
        ({"loss_mask": [0, 1]}, r"column 'loss_mask' is \[0, 1\], but rows are not weighed"),
        ({"weight": 0.5}, "column 'weight' is 0.5"),
        ({"system": 3}, "'system' must be text"),
        ({"system": "s", "system_prompt": "t"}, "'system_prompt' is not the system message"),
        ({"tools": "what"}, "'tools' must be a list"),
        ({"history": ["q1", "a1"]}, "'history' must hold pairs"),
        ({"instruction": "i"}, r"prompt, instruction are columns .* --column_map instruction="),
        ({"output": "o"}, "response, output are columns"),
        ({"input": ["x"]}, "'input' must be text"),
    ],
)
def test_a_column_that_would_change_what_is_learned_is_refused_by_name(more, message):
    row = {"prompt": "q", "response": "a"}
    with pytest.raises(DataError, match=rf"d\.jsonl, row 0: .*{message}"):
        to_conversation(row | more, "d.jsonl, row 0")
    assert said(row | dict.fromkeys(more)) == ASKED
    # A column can be left out by name.
    assert said(row | more, renamed=dict.fromkeys(more, "")) == ASKED
    if len(more) == 1:
        assert said(row | more, context=next(iter(more))) == ASKED


def test_a_prompt_of_messages_is_shown_and_never_learned(word_tokenizer):
    prompt = [{"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2"), ("user", "w3"))]
    row = to_conversation({"prompt": prompt, "completion": [{"role": "assistant", "content": "w4"}]}, "row")
    encoded = encode_all([row], word_tokenizer, EncodingOptions(train_turns="all"))[0]
    assert word_tokenizer.decode([label for label in encoded["labels"] if label >= 0]) == "w4 <|eot|>"


def test_calls_of_sharegpt_become_tool_calls():
    turns = [("human", "q"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "o"), ("gpt", "a")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns], "tools": '[{"name": "f"}]'}
    read = to_conversation(row, "row")
    assert [message["role"] for message in read["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert read["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert read["tools"] == [{"type": "function", "function": {"name": "f"}}]


def test_a_text_is_learned_whole_and_ends(word_tokenizer, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "w1 w2", "id": 1}])
    row = encode_all(load_conversations(path)["train"], word_tokenizer, EncodingOptions())[0]
    assert word_tokenizer.decode(row["input_ids"]) == "w1 w2 <|endoftext|>"
    assert (row["labels"], row["prompt_length"]) == (row["input_ids"], 0)
    for more in ({"system": "s"}, {"history": [["a", "b"]]}):
        with pytest.raises(DataError, match="has no place beside a plain 'text'"):
            to_conversation({"text": "w1", **more}, "row")
    with pytest.raises(DataError, match="'text' is empty"):
        to_conversation({"text": " "}, "row")


def test_an_unknown_layout_lists_the_columns_the_layouts_and_a_guess():
    with pytest.raises(DataError, match=r"it has: prmpt, reply\..*--column_map.*Perhaps --column_map prmpt=prompt"):
        to_conversation({"prmpt": "q", "reply": "a"}, "row")


def test_columns_can_be_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"q": "w1", "a": "w2", "history": [["x"]]}, {"prompt": "w3", "response": "w4"}])
    columns = EncodingOptions(column_map="q=prompt, a=response, history=").columns
    found = list(load_conversations(path, columns)["train"])
    assert [[message["content"] for message in row["messages"]] for row in found] == [["w1", "w2"], ["w3", "w4"]]
    with pytest.raises(DataError, match=r"has no column 'question'; it has .*"):
        load_conversations(path, Columns({"question": "prompt"}))
    with pytest.raises(DataError, match=r"no column 'promt'.* Did you mean 'prompt'"):
        load_conversations(path, Columns({"promt": "query"}))
    with pytest.raises(DataError, match="row 0: column_map: 'prompt' is a column already"):
        to_conversation({"a": "x", "prompt": "y", "response": "z"}, "d, row 0", Columns({"a": "prompt"}))


@pytest.mark.parametrize("text", ["question", "a=b=c", "=prompt", "a=prompt,b=prompt", "a=x,a=y", "a=prompt,"])
def test_a_map_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="column_map"):
        parse_column_map(text)
    with pytest.raises(ConfigError, match="column_map"):
        EncodingOptions(column_map=text)


def test_unused_columns_are_known(tmp_path):
    rows = [
        {"instruction": "q", "output": "a", "text": "q a", "id": 1},
        {"instruction": "q", "output": "a", "lang": "en"},
    ]
    path = jsonl(tmp_path / "x.jsonl", rows)
    assert load_conversations(path)["train"].unused_columns() == {path: ["id", "lang", "text"]}
    columns = Columns({"text": ""}, context="id")
    assert load_conversations(path, columns)["train"].unused_columns() == {path: ["lang"]}
