"""The tokenizers of the studies: whole words, and byte pairs."""

import pytest

from memdlm.data.chat import ChatEncoder
from memdlm.data.tokenizer import SPECIAL, UNKNOWN, build_byte_pair_tokenizer

TEXTS = ["Mara keeps the candle in the kitchen.", "Hugo keeps the lamp in the kitchen."] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_pair_tokenizer(TEXTS, 320)


def test_frequent_words_are_one_token_and_unseen_ones_several(tokenizer):
    encode = ChatEncoder(tokenizer).text
    assert len(tokenizer) <= 320
    assert len(encode("kitchen")) == 1
    assert len(encode("Zübrow")) > 1


@pytest.mark.parametrize("text", ["Mara keeps", "Zübrow \N{SNOWMAN}", "a  b", "<|mask|>"])
def test_any_text_comes_back(text, tokenizer):
    assert tokenizer.decode(ChatEncoder(tokenizer).text(text)) == f" {text}"


def test_a_word_is_the_same_tokens_wherever_it_stands(tokenizer):
    encode = ChatEncoder(tokenizer).text
    assert encode("the kitchen") == encode("the") + encode("kitchen")


def test_its_control_tokens_are_those_of_the_other_tokenizer(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([each for each in SPECIAL if each != UNKNOWN])
    assert ids == [0, 1, 2, 3]
    assert tokenizer.unk_token is None
    assert tokenizer.mask_token_id == 1
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.chat_template is None
