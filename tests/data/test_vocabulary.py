"""Unknown words are counted and named; a word tokenizer that spells loses nothing and keeps every word's id."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from memdlm.data import TASKS, build_word_tokenizer
from memdlm.data.vocabulary import LOOKED_AT, looked_at, unknown_in_conversations, unknown_words
from memdlm.errors import DataError
from memdlm.templates import message_ids, text_ids

WORDS = ("a", "k1", "k2", "is", "v3")
ALONE, SPELLING = build_word_tokenizer(WORDS), build_word_tokenizer(WORDS, spells=True)


@pytest.mark.parametrize("task", TASKS)
def test_word_ids_stay_and_bytes_come_behind_them(task):
    words = TASKS[task](wording="symbols").words()
    alone, spelling = build_word_tokenizer(words), build_word_tokenizer(words, spells=True)
    assert len(spelling) == len(alone) + 256
    assert [spelling(word).input_ids for word in words] == [alone(word).input_ids for word in words]
    sample = TASKS[task](wording="symbols").records(1, 60, seed=0)[0]
    assert message_ids(spelling, sample.messages) == message_ids(alone, sample.messages)
    for name in ("mask", "eos", "pad", "unk"):
        assert getattr(spelling, f"{name}_token_id") == getattr(alone, f"{name}_token_id")


@given(st.lists(st.one_of(st.sampled_from([*WORDS, "<|mask|>", "<|eot|>"]), st.text(min_size=1))).map(" ".join))
def test_no_text_is_lost(text):
    """White space aside. A text of known words and control tokens is decoded as before."""
    try:
        ids = text_ids(SPELLING, text)
    except DataError:
        return  # half of a surrogate pair
    assert SPELLING.decode(ids).split() == text.split()
    assert SPELLING.unk_token_id not in ids


@given(st.lists(st.sampled_from([*WORDS, "<|mask|>", "<|user|>", "<|eot|>", "<unk>"])).map(" ".join))
def test_known_words_are_decoded_as_before(text):
    ids = ALONE(text).input_ids
    assert SPELLING(text).input_ids == ids
    assert SPELLING.decode(ids) == ALONE.decode(ids)


@pytest.mark.parametrize("spells", [False, True])
@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Bring Hugo tea. The grass, green!", "bring Hugo tea the grass green"),
        ("bring Hugo Tea?!\nThe grass", "bring Hugo tea the grass"),
        ("The.", "the"),
        ("Rose rose", "Rose rose"),
    ],
)
def test_sentences_are_read_as_their_words(spells, text, plain):
    words = ("bring", "Hugo", "tea", "the", "grass", "green", "Rose", "rose")
    tokenizer = build_word_tokenizer(words, spells=spells, sentences=True)
    assert tokenizer(text).input_ids == build_word_tokenizer(words)(plain).input_ids
    assert unknown_words(tokenizer, [text]).words == ()


def test_other_capitals_and_points_inside_words_are_kept(tmp_path):
    tokenizer = build_word_tokenizer(("bring", "tea"), spells=True, sentences=True)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.decode(each("Bring Zoe 3.50 tea, T. x. Teas").input_ids) == "bring Zoe 3.50 tea T x Teas"


def test_a_spelling_tokenizer_is_saved_and_loaded(tmp_path):
    SPELLING.save_pretrained(tmp_path)
    text = "about Hugo \u00d6tto 42 k1 is k12 \u65e5\u672c"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == SPELLING(text).input_ids


def test_unknown_words_are_counted_by_letters_and_named_in_order():
    found = unknown_words(ALONE, ["k1 is Hugo", "a Hugo 42"])
    assert found.words == ("Hugo", "42")
    assert found.lost
    assert found.are_many
    assert found.share == pytest.approx(10 / (2 + 2 + 4 + 1 + 4 + 2))
    line = found.line("document 'x.txt'")
    assert line.startswith("warning: document 'x.txt': 67 % of the letters")
    assert "(Hugo, 42)" in line
    assert "same unknown token" in line
    spelled = unknown_words(SPELLING, ["k1 is Hugo", "a Hugo 42"])
    assert (spelled.words, spelled.share, spelled.lost) == (found.words, found.share, False)
    assert "spelled byte by byte" in spelled.line("x")


def test_nothing_is_said_where_nothing_is_missing():
    for tokenizer in (ALONE, SPELLING):
        assert not unknown_words(tokenizer, ["k1 is v3", ""]).are_many
        assert not unknown_words(tokenizer, []).are_many
    assert not unknown_words(ALONE, [" ".join(["k1"] * 1000), "Hugo"]).are_many


def test_control_tokens_are_known():
    for tokenizer in (ALONE, SPELLING):
        assert unknown_words(tokenizer, ["k1 <|mask|> <|mask|><|eot|>"]).words == ()


def test_a_warning_stays_short():
    line = unknown_words(ALONE, [" ".join(f"{letter * 40}" for letter in "bcdefgh")]).line("x")
    assert "and 2 more" in line
    assert "b" * 20 + "..." in line
    assert "b" * 21 not in line


@given(st.integers(0, 5000))
def test_a_sample_of_conversations_has_each_at_most_once(count):
    places = looked_at(count)
    assert len(set(places)) == len(places) == min(count, LOOKED_AT)
    assert set(places) <= set(range(count))
    assert places == looked_at(count)


def test_conversations_are_looked_at_whole_and_odd_ones_are_left_to_their_encoder():
    rows = [
        {"messages": [{"role": "user", "content": "k1 Hugo"}, {"role": "assistant", "content": "v3"}], "text": "Otto"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "k1"}]}, "odd", {"content": "\ud800"}]},
        {"other": 3},
    ]
    assert unknown_in_conversations(ALONE, rows).words == ("Hugo",)
    assert unknown_in_conversations(ALONE, rows, "text").words == ("Hugo", "Otto")
