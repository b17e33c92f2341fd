"""The dataset grammar, and what it loads: disjoint splits, ordered mixtures, exact names, local copies."""

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdlm.data import load_conversations, parse_specs
from memdlm.data.sources import KNOWN, hub_id, load_splits
from memdlm.data.specs import DatasetSpec
from memdlm.errors import DataError


def rows_of(*words):
    return [{"prompt": f"ask {word}", "response": f"say {word}"} for word in words]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(conversations):
    return [each["messages"][-1]["content"] for each in conversations]


# The grammar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tatsu-lab/alpaca", [DatasetSpec("tatsu-lab/alpaca")]),
        ("tatsu-lab/alpaca[train:5000]", [DatasetSpec("tatsu-lab/alpaca", {"train": 5000})]),
        (
            " a[train:1_000,test:100] + b |c[]|",
            [DatasetSpec("a", {"train": 1000, "test": 100}), DatasetSpec("b"), DatasetSpec("c")],
        ),
        (
            "OpenCoder-LLM/opc-sft-stage2[name:educational_instruct,lang:python]",
            [DatasetSpec("OpenCoder-LLM/opc-sft-stage2", {}, {"name": "educational_instruct", "lang": "python"})],
        ),
        ("'a+b|c[1].jsonl'[train:3]", [DatasetSpec("a+b|c[1].jsonl", {"train": 3})]),
        ('"it\'s.jsonl"+x', [DatasetSpec("it's.jsonl"), DatasetSpec("x")]),
        ("it's.jsonl + x=y/z", [DatasetSpec("it's.jsonl"), DatasetSpec("x=y/z")]),
    ],
)
def test_datasets_are_read_off_the_text(text, expected):
    assert parse_specs(text) == expected


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12).filter(
    lambda name: not ("'" in name and '"' in name)
)
LIMITS = st.dictionaries(st.sampled_from(["train", "test", "validation"]), st.integers(1, 10**7))


@given(st.lists(st.builds(DatasetSpec, NAMES, LIMITS, st.just({})), min_size=1, max_size=4), st.sampled_from("+|"))
def test_what_is_written_is_read_back(specs, joint):
    assert parse_specs(joint.join(map(str, specs))) == specs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no dataset"),
        (" + | ", "names no dataset"),
        ("[train:5]", "has no dataset before its brackets"),
        ("a[train]", r"'train' in 'a\[train\]' is not of the form key:value"),
        ("a[train:-5]", "whole number above 0"),
        ("a[train:10k]", "train:10k"),
        ("a[train:0]", "whole number above 0"),
        ("a[train:5,train:6]", "'train' is given twice"),
        ("a[train:5", "']' is missing"),
        ("'a.jsonl", '"\'" is missing'),
        ("a[train:5]b", "brackets come last"),
    ],
)
def test_a_text_that_means_nothing_is_refused_with_the_piece(text, message):
    with pytest.raises(DataError, match=message):
        parse_specs(text)


# Splits and mixtures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["train:{a},test:{b}", "test:{b},train:{a}"])
@given(data=st.data())
def test_a_single_split_is_cut_into_parts_that_do_not_overlap(order, data, tmp_path_factory):
    total = data.draw(st.integers(2, 12))
    a = data.draw(st.integers(1, total - 1))
    b = data.draw(st.integers(1, total - a))
    path = jsonl(tmp_path_factory.mktemp("d") / "x.jsonl", rows_of(*range(total)))
    found = load_conversations(f"{path}[{order.format(a=a, b=b)}]")
    train, test = answers(found["train"]), answers(found["test"])
    everything = [f"say {n}" for n in range(total)]
    assert list(found) == ["train", "test"]
    assert train == everything[:a]
    assert test == everything[total - b :]
    assert not set(train) & set(test)


def test_more_rows_than_there_are_is_refused(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", rows_of(*range(10)))
    for text, message in [
        ("[train:8,test:3]", "asks for 11 rows .*but there are 10"),
        ("[train:11]", "asks for 11 rows"),
    ]:
        with pytest.raises(DataError, match=message):
            load_conversations(f"{path}{text}")


def test_splits_of_their_own_are_cut_each_and_others_stay(tmp_path):
    parts = {name: datasets.Dataset.from_list(rows_of(*(f"{name}{n}" for n in range(5)))) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    found = load_conversations(f"{tmp_path / 'saved'}[train:2]")
    assert answers(found["train"]) == ["say train0", "say train1"]
    assert len(found["test"]) == 5
    with pytest.raises(DataError, match=r"no split 'validation'; there are train, test"):
        load_conversations(f"{tmp_path / 'saved'}[validation:2]")


def test_a_mixture_keeps_the_order_in_which_it_is_written(tmp_path):
    odd = jsonl(tmp_path / "a+b|c [odd].jsonl", rows_of("x", "y"))
    plain = jsonl(tmp_path / "plain.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}, *rows_of("z")])
    found = load_conversations(f"{plain}[train:1,test:1] + '{odd}'")
    assert answers(found["train"]) == ["hi", "say x", "say y"]
    assert answers(found["test"]) == ["say z"]
    assert answers(found["train"][1:]) == ["say x", "say y"]
    assert found["train"][-1] == found["train"][2]
    with pytest.raises(IndexError):
        found["train"][3]


# Names and columns --------------------------------------------------------------------------------------------------


def test_known_datasets_are_recognised_by_their_whole_name_only(tmp_path, monkeypatch):
    rows = [{"instruction": f"do {n}", "input": "this" if n else "", "output": f"done {n}"} for n in range(20)]
    copy = tmp_path / "mirror" / "tatsu-lab" / "alpaca"
    jsonl(copy / "data.jsonl", rows)
    (tmp_path / "not-tatsu-lab").mkdir()
    other = jsonl(tmp_path / "not-tatsu-lab" / "alpaca-like.jsonl", rows)
    assert {hub_id(str(copy)), hub_id("tatsu-lab/alpaca")} <= set(KNOWN)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BASE_DATASETS_DIR", str(tmp_path / "mirror"))
    by_name = load_conversations("tatsu-lab/alpaca")
    assert {split: len(found) for split, found in by_name.items()} == {"train": 19, "test": 1}
    assert set(load_conversations(str(other))) == {"train"}
    whole = {row["messages"][0]["content"] for split in by_name.values() for row in split}
    assert "do 1\n\nthis" in whole
    assert "do 0" in whole


def test_a_base_folder_does_not_hide_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_DATASETS_DIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or pytest.fail.Exception)
    with pytest.raises(AttributeError):
        load_splits(DatasetSpec("HuggingFaceTB/smoltalk"))
    assert asked == [("HuggingFaceTB/smoltalk", "all")]


def test_the_language_filter_reads_code_fences_and_nothing_else(tmp_path, monkeypatch):
    outputs = ["```python\nx\n```", "I like python", "```pythonic\nx\n```", "```Python\ny\n```"] * 10
    rows = datasets.Dataset.from_list([{"instruction": "q", "output": each} for each in outputs])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(train=rows))
    spec = "OpenCoder-LLM/opc-sft-stage2[name:evol_instruct,lang:python]"
    found = load_conversations(spec)
    assert {len(found["train"]), len(found["test"])} == {19, 1}
    assert {text.lower()[:10] for split in found.values() for text in answers(split)} == {"```python\n"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("{folder}/none.jsonl", "does not exist"),
        ("{folder}/x y", "neither|does not exist"),
        ("{folder}/x.jsonl[name:a]", "local one"),
        ("some/where[lang:python]", "lang is known for"),
    ],
)
def test_what_cannot_be_is_refused(args, message, tmp_path):
    jsonl(tmp_path / "x.jsonl", rows_of("a"))
    with pytest.raises(DataError, match=message):
        load_conversations(args.format(folder=tmp_path))


def test_a_malformed_line_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "response": "b\\u2028c"}\n\n{"prompt": "a", \n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 3 is no JSON"):
        load_conversations(str(path))
    path.write_bytes(b'{"prompt": "a", "response": "\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 1 is no JSON"):
        load_conversations(str(path))
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 holds a list, not an object"):
        load_conversations(str(path))


def test_a_line_separator_inside_text_is_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "response": "b\u2028c"}\n', encoding="utf-8")
    assert answers(load_conversations(str(path))["train"]) == ["b\u2028c"]


def test_a_row_of_other_columns_is_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [*rows_of("a"), {"body": "b"}])
    with pytest.raises(DataError, match=r"row 1 has neither .* it has: body"):
        list(load_conversations(str(path))["train"])
    path = jsonl(tmp_path / "y.jsonl", [{"prompt": "a", "response": None}])
    with pytest.raises(DataError, match="'response' must be text, got None"):
        list(load_conversations(str(path))["train"])
