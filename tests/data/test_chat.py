"""Conversations become tokens and labels by their own template, checked, and errors say what is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdlm.data import build_word_tokenizer, encode_chat
from memdlm.data.chat import ChatEncoder
from memdlm.errors import DataError
from memdlm.types import IGNORE_INDEX

WORDS = ["a", "b", "c", "d"]
TOKENIZER = build_word_tokenizer(WORDS)
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)


def conversation(turns):
    return [
        {"role": role, "content": text}
        for user, assistant in turns
        for role, text in (("user", user), ("assistant", assistant))
    ]


@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), train_turns=st.sampled_from(["last", "all"]))
def test_what_is_supervised_is_the_answers_and_their_ends(turns, train_turns):
    encoded = encode_chat(TOKENIZER, conversation(turns), train_turns=train_turns)
    learned = [token for token in encoded.labels if token != IGNORE_INDEX]
    answers = [answer for _, answer in turns]
    expected = " ".join(f"{answer} <|eot|>" for answer in (answers[-1:] if train_turns == "last" else answers))
    assert TOKENIZER.decode(learned) == expected
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert encoded.labels[: encoded.prompt_length] == [IGNORE_INDEX] * encoded.prompt_length
    assert encoded.labels[encoded.prompt_length] != IGNORE_INDEX


def test_without_prompt_masking_everything_is_supervised():
    encoded = encode_chat(TOKENIZER, conversation([("a b", "c")]), mask_prompt_loss=False)
    assert encoded.labels == encoded.input_ids
    assert encoded.prompt_length == 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "last message is from 'user'"),
        ([{"role": "robot", "content": "a"}], "'robot' is not known"),
        ([{"content": "a"}], "message 0 needs 'role'"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_refused(messages, message):
    with pytest.raises(DataError, match=message):
        encode_chat(TOKENIZER, messages)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else 'a' }} {% endfor %}"
    with pytest.raises(DataError, match="does not keep its prefixes"):
        encode_chat(tokenizer, conversation([("b", "c"), ("b", "d")]), train_turns="all")


def test_a_tokenizer_without_template_and_a_bad_row_are_named():
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="row 0: the tokenizer has no chat template"):
        ChatEncoder(tokenizer).encode_rows([{"messages": conversation([("a", "b")])}])
    rows = [{"messages": conversation([("a", "b")])}, {"messages": [{"role": "user", "content": "a"}]}]
    with pytest.raises(DataError, match="row 1: the conversation has no assistant turn"):
        ChatEncoder(TOKENIZER).encode_rows(rows)


def test_an_unknown_choice_lists_the_choices():
    with pytest.raises(DataError, match=r"train_turns: 'lats' is not known. Possible: last, all.*'last'"):
        encode_chat(TOKENIZER, conversation([("a", "b")]), train_turns="lats")
