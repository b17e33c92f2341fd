"""Conversations encoded by pieces are, token for token, those of the template tokenized prefix by prefix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kinds import KINDS, ordinary, spelled, tokenizer_of
from memdlm.data.chat import ChatEncoder, encode_chat
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.data.turns import is_empty
from memdlm.errors import DataError
from memdlm.templates import control_of
from memdlm.types import IGNORE_INDEX


def by_prefixes(tokenizer, messages, train_turns):
    """The straightforward encoding: the conversation and each prefix templated and tokenized by themselves."""

    def ids(part, generation=False):
        return list(
            tokenizer.apply_chat_template(part, tokenize=True, add_generation_prompt=generation, return_dict=False)
        )

    whole = ids(messages)
    labels = [IGNORE_INDEX] * len(whole)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index in turns[-1:] if train_turns == "last" else turns:
        head, end = ids(messages[:index], generation=True), ids(messages[: index + 1])
        if whole[: len(head)] != head or whole[: len(end)] != end:
            return None
        labels[len(head) : len(end)] = whole[len(head) : len(end)]
    return whole, labels


def exchanges(turns):
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@given(
    turns=st.lists(st.tuples(ordinary, ordinary), min_size=1, max_size=3),
    train_turns=st.sampled_from(["last", "all"]),
    has_system=st.booleans(),
)
def test_pieces_are_what_prefixes_are(kind, turns, train_turns, has_system):
    tokenizer = tokenizer_of(kind)
    messages = [{"role": "system", "content": "a b"}] * has_system + exchanges(turns)
    expected = by_prefixes(tokenizer, messages, train_turns)
    if expected is None:
        with pytest.raises(DataError, match="does not keep its prefixes"):
            encode_chat(tokenizer, messages, train_turns=train_turns)
        return
    encoded = encode_chat(tokenizer, messages, train_turns=train_turns)
    assert (encoded.input_ids, encoded.labels) == expected
    assert all(label == IGNORE_INDEX for label in encoded.labels[: encoded.prompt_length])


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_at_once_are_what_each_is_alone(kind):
    tokenizer = tokenizer_of(kind)
    rows = [{"messages": exchanges([(f"a t{n} b", f"c <|> t{n}")] * (1 + n % 3))} for n in range(20)]
    rows[3] = {"text": "a b " + tokenizer.mask_token}
    rows[7]["messages"][0]["content"] = tokenizer.eos_token + " a"
    encoder = ChatEncoder(tokenizer, train_turns="all")
    together = encoder.encode_rows(rows)
    assert together == [encoder.encode([row])[0] for row in rows]
    assert tokenizer.mask_token_id not in together[3].input_ids
    assert together[3].labels == together[3].input_ids
    assert together[3].input_ids[-1] == tokenizer.eos_token_id
    rows[11]["messages"][0]["content"] = "a \udc00"
    with pytest.raises(DataError, match="row 111: message 0: character 2"):
        encoder.encode_rows(rows, first=100)


def learned(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("kind", KINDS)
def test_no_control_token_of_a_text_is_ever_a_target(kind):
    tokenizer = tokenizer_of(kind)
    for token in spelled(kind):
        encoded = encode_chat(tokenizer, exchanges([("a", f"b {token} c")]))
        clean = encode_chat(tokenizer, exchanges([("a", "b c")]))
        control = set(control_of(tokenizer).ids.values())
        ends = [label for label in clean.labels if label in control]
        assert [label for label in encoded.labels if label in control] == ends


def test_a_conversation_that_begins_with_an_answer_learns_no_header():
    tokenizer = tokenizer_of("bytes")
    messages = [{"role": "assistant", "content": "the mask"}, *exchanges([("a", "b")])]
    encoded = encode_chat(tokenizer, messages, train_turns="all")
    assert learned(tokenizer, encoded) == "the mask<|eot_id|>b<|eot_id|>"
    two = [*exchanges([("a", "b")]), {"role": "assistant", "content": "c"}]
    assert learned(tokenizer, encode_chat(tokenizer, two, train_turns="all")) == "b<|eot_id|>c<|eot_id|>"
    assert learned(tokenizer, encode_chat(tokenizer, exchanges([("a", "")]))) == "<|eot_id|>"


def test_turns_follow_their_own_marks():
    tokenizer = tokenizer_of("bytes")
    messages = exchanges([("a", "b"), ("c", "d"), ("e", "f")])
    messages[1]["weight"], messages[3]["train"] = 1, False
    assert learned(tokenizer, encode_chat(tokenizer, messages)) == "b<|eot_id|>f<|eot_id|>"
    assert learned(tokenizer, encode_chat(tokenizer, messages, train_turns="all")) == "b<|eot_id|>f<|eot_id|>"
    whole = encode_chat(tokenizer, messages, mask_prompt_loss=False)
    assert whole.labels.count(IGNORE_INDEX) == 2  # d and its end
    nothing = exchanges([("a", "b")])
    nothing[1]["loss_mask"] = 0
    encoded = encode_chat(tokenizer, nothing)
    assert encoded.prompt_length == len(encoded.input_ids)


@pytest.mark.parametrize(
    ("place", "mark", "message"),
    [
        (1, {"weight": 0.5}, "message 1: weight=0.5; possible: 0 or false"),
        (1, {"train": "no"}, "message 1: train='no'"),
        (1, {"train": True, "loss": 0}, "train=True, loss=0 disagree"),
        (0, {"trainable": 1}, r"message 0 \(user\): trainable=1, but only turns of the assistant"),
        (1, {"images": ["x.png"]}, "message 1 has 'images', which is no text"),
        (1, {"content": [{"type": "image_url", "image_url": "x"}]}, "only parts of type 'text'"),
        (1, {"content": None}, "content must be text, got None"),
        (1, {"reasoning_content": "because"}, r"message 1 \(assistant\) has 'reasoning_content', which the chat"),
        (0, {"name": "Ann"}, "message 0 .* has 'name', which the chat template does not render"),
        (1, {"function_call": {"name": "f", "arguments": "{}"}}, "has 'tool_calls', which the chat template"),
    ],
)
def test_what_a_message_cannot_say_is_refused_by_name(place, mark, message):
    messages = exchanges([("a", "b")])
    messages[place] |= mark
    with pytest.raises(DataError, match=message):
        encode_chat(tokenizer_of("words"), messages)
    messages[place] |= dict.fromkeys(mark) | {"content": "b"}
    assert encode_chat(tokenizer_of("words"), messages) == encode_chat(
        tokenizer_of("words"), exchanges([("b", "b")] if place == 0 else [("a", "b")])
    )


KNOWS_TOOLS = (
    "{% for t in tools or [] %}<|user|> {{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %} {{ c.function.name }}{% endfor %} <|eot|> "
    "{% else %}<|user|> {{ m.content }} {% endif %}{% endfor %}"
)


def test_tools_and_calls_go_through_the_template_or_are_refused():
    tools = [{"type": "function", "function": {"name": "b", "description": "c"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "c"}}]}
    result = {"role": "tool", "content": "a", "tool_call_id": "1"}
    messages = [{"role": "user", "content": "a"}, call, result, {"role": "assistant", "content": "a"}]
    tokenizer = build_word_tokenizer(["a", "b", "c"])
    with pytest.raises(DataError, match=r"does not render 'tools'.*--column_map tools="):
        encode_chat(tokenizer, exchanges([("a", "b")]), tools=tools)
    tokenizer.chat_template = KNOWS_TOOLS
    encoded = encode_chat(tokenizer, messages, tools=tools, train_turns="all")
    assert tokenizer.decode(encoded.input_ids) == "<|user|> b <|user|> a c <|eot|> <|user|> a a <|eot|>"
    assert learned(tokenizer, encoded) == "c <|eot|> a <|eot|>"
    messages[2] = result | {"tool_call_id": "2"}
    with pytest.raises(DataError, match=r"message 2 .* has 'tool_call_id'"):
        encode_chat(tokenizer, messages, tools=tools)


def test_empty_is_nothing_to_say():
    assert all(is_empty(value) for value in (None, "", " ", [], {}, ()))
    assert not any(is_empty(value) for value in (0, False, "a", [None]))


def test_a_tokenizer_that_joins_the_header_with_the_answer_is_refused():
    """`A:` and `x` become one token `:x`, so no token begins the answer and what is learned cannot be told."""
    vocabulary = {piece: index for index, piece in enumerate(["<|e|>", "<|m|>", "A", ":", "x", "y", "q", ":x"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", "x")]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|e|>",
        mask_token="<|m|>",
        chat_template=(
            "{% for m in messages %}{% if m.role == 'assistant' %}A:{% endif %}{{ m.content }}<|e|>{% endfor %}"
            "{% if add_generation_prompt %}A:{% endif %}"
        ),
    )
    encoded = encode_chat(tokenizer, exchanges([("q", "y")]))
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.prompt_length :]) == ["y", "<|e|>"]
    with pytest.raises(DataError, match="does not keep its prefixes"):
        encode_chat(tokenizer, exchanges([("q", "x")]))
