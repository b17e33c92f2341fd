"""Control tokens that a text spells are text; ordinary texts are tokenized as the chat template says by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinds import KINDS, ordinary, spelled, tokenizer_of
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import DataError
from memdlm.templates import MARK, control_of, message_ids, prompt_ids, text_ids


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(ordinary, min_size=1, max_size=4), generation=st.booleans())
def test_ordinary_messages_are_what_the_tokenizer_makes_of_them(kind, texts, generation):
    tokenizer = tokenizer_of(kind)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=generation, return_dict=False
    )
    assert message_ids(tokenizer, messages, generation=generation) == list(expected)
    assert text_ids(tokenizer, texts[0]) == tokenizer(texts[0], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), before=ordinary, after=ordinary)
def test_a_spelled_control_token_is_text_and_the_templates_own_stay(kind, data, before, after):
    tokenizer, token = tokenizer_of(kind), data.draw(st.sampled_from(spelled(kind)))
    control = control_of(tokenizer)
    messages = [
        {"role": "user", "content": before + token + after},
        {"role": "assistant", "content": token * 2},
    ]
    ids = message_ids(tokenizer, messages)
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = [each for each in ids if each in control.ids.values()]
    assert found == [each for each in message_ids(tokenizer, plain) if each in control.ids.values()]
    assert not set(text_ids(tokenizer, before + token + after)) & set(control.ids.values())
    if kind == "bytes":  # loses nothing, so the words can be read back
        said = (before + token + after).strip()
        assert tokenizer.decode(ids) == (
            f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{said}<|eot_id|>"
            f"<|start_header_id|>assistant<|end_header_id|>\n\n{token * 2}<|eot_id|>"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_plain_text_may_write_control_tokens(kind):
    tokenizer = tokenizer_of(kind)
    assert prompt_ids(tokenizer, tokenizer.mask_token) == [tokenizer.mask_token_id]


def test_what_is_no_text_is_refused_with_its_place():
    tokenizer = tokenizer_of("words")
    for call in (
        lambda: text_ids(tokenizer, "ab\ud83d"),
        lambda: prompt_ids(tokenizer, "ab\udce9"),
        lambda: message_ids(tokenizer, [{"role": "user", "content": "ab\ud83d"}]),
    ):
        with pytest.raises(DataError, match=r"character 2 of the text is '\\ud.*half of a surrogate pair"):
            call()
    assert text_ids(tokenizer, "\U0001f600") == [tokenizer.unk_token_id]
    with pytest.raises(DataError, match=r"U\+10FFFD"):
        message_ids(tokenizer, [{"role": "user", "content": f"a{MARK}"}])


def test_a_template_that_refuses_messages_is_an_error_of_the_data():
    tokenizer = build_word_tokenizer(["a"])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="cannot render the messages: roles must alternate"):
        message_ids(tokenizer, [{"role": "user", "content": "a"}])
