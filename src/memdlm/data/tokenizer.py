"""Tokenizers for studies, saved and loaded like any other: word by word for synthetic text, byte pairs for English."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS, MASK, USER, EOT, UNKNOWN = "<|endoftext|>", "<|mask|>", "<|user|>", "<|eot|>", "<unk>"
SPECIAL = (EOS, MASK, USER, EOT, UNKNOWN)

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }} <|eot|> "
    "{% else %}<|user|> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
)


def build_word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id per word: special tokens first, then `words` sorted, duplicates removed.

    EOS pads, on the right; unknown words become <unk>. In the chat template <|user|> starts a question and <|eot|> ends
    an answer. No token separates the two, so that an answer follows its question's last words as a fact's value follows
    its key.
    """
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(set(words) - set(SPECIAL))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return _wrapped(tokenizer, unk_token=UNKNOWN, chat_template=TEMPLATE)


def build_byte_pair_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of `size` ids, trained on `texts`; rare words become several tokens.

    Any text can be spelled, so there is no unknown word. Every text begins as if a space stood before it: a word is the
    same tokens wherever it stands. Special tokens and padding are those of `build_word_tokenizer`. There is no chat
    template: what stands between words is part of them here.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in SPECIAL if token != UNKNOWN]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[USER, EOT],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **more,
    )
