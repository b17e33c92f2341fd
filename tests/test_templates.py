"""Control tokens that a text spells are text; ordinary texts are tokenized as the chat template says by itself."""

import functools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import DataError
from memdlm.models.families import LLADA_TEMPLATE
from memdlm.models.tokenizers import load_tokenizer
from memdlm.templates import MARK, control_of, message_ids, prompt_ids, text_ids

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("llada", "lladamoe", "llada21", "words", "bytes")
CONTROL = ["<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"]


@functools.lru_cache
def tokenizer_of(kind):
    if kind == "words":
        return build_word_tokenizer(["a", "b", "c"])
    if kind != "bytes":
        return load_tokenizer(GOLDEN / kind / "checkpoint")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=CONTROL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the mask is on the left, and the text ends at the <|end|>\n\n" * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=CONTROL[1],
        eos_token=CONTROL[0],
        pad_token=CONTROL[0],
        mask_token=CONTROL[-1],
        additional_special_tokens=CONTROL[2:5],
        chat_template=LLADA_TEMPLATE,
    )


def spelled(kind):
    return sorted(control_of(tokenizer_of(kind)).ids)


# Letters that tokenizers treat in their own ways, and halves of control tokens.
LETTERS = [*"abc t1\n\t.,<|>_[]", "mask", "<|", "|>", "endoftext", "\u00e9", "\U0001f600", "  "]
ordinary = st.lists(st.sampled_from(LETTERS), max_size=12).map("".join)
ordinary = ordinary.filter(lambda text: not any(token in text for kind in KINDS for token in spelled(kind)))


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
