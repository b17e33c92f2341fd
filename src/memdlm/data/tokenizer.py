"""Tokenizers, saved and loaded like any other: by word for synthetic text, by byte pairs for English, by a pattern."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from memdlm.errors import ConfigError, DataError

EOS, MASK, USER, EOT, UNKNOWN = "<|endoftext|>", "<|mask|>", "<|user|>", "<|eot|>", "<unk>"
SPECIAL = (EOS, MASK, USER, EOT, UNKNOWN)

BERT = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""The special tokens of BERT-like models."""
PATTERNS = {
    "smiles": r"\[[^\]]+\]|Br|Cl|%\([0-9]{3}\)|%[0-9]{2}|>>|[BCNOSPFIbcnosp0-9().=#+\\/:~@?>*$|-]",
}
"""Patterns by name. smiles: a match per atom, bond, ring or branch of a molecule or reaction (Schwaller et al.)."""

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }} <|eot|> "
    "{% else %}<|user|> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
)


def build_word_tokenizer(
    words: Iterable[str], *, spells: bool = False, sentences: bool = False
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id per word: special tokens first, then `words` sorted, duplicates removed.

    EOS pads, on the right. Other words become <unk>; with `spells`, they are spelled instead: a space, then their
    UTF-8 bytes, with 256 more ids behind those of the words, so that names and numbers survive. With `sentences`,
    punctuation behind a word is dropped, and a known word may begin with a capital letter: "Bring Hugo tea." is read as
    "bring Hugo tea". Runs of white space become one space. In the chat template <|user|> starts a question and <|eot|>
    ends an answer. No token separates the two, so that an answer follows its question's last words as a fact's value
    follows its key.
    """
    known = sorted(set(words) - set(SPECIAL))
    tokenizer = _spelling(known) if spells else _words_alone(known)
    if sentences:
        tokenizer.normalizer = _plain(known)
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


def build_pattern_tokenizer(vocabulary: Sequence[str], pattern: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits text into the matches of `pattern` and looks each up in `vocabulary`, in id order.

    The special tokens are BERT's; [CLS] begins a text and [SEP] ends it, where special tokens are asked for. What the
    pattern does not match, or the vocabulary does not have, becomes [UNK]. Decoded tokens follow each other without
    spaces. `PATTERNS` has patterns by name.

    Raises DataError for a vocabulary with a token twice or without BERT's special tokens, ConfigError for a pattern
    that is no regular expression.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    missing = [token for token in BERT.values() if token not in ids]
    if missing:
        raise DataError(f"the vocabulary of {len(ids)} tokens lacks {', '.join(missing)}; it must have BERT's.")
    if len(ids) != len(vocabulary):
        twice = next(token for index, token in enumerate(vocabulary) if ids[token] != index)
        raise DataError(f"the vocabulary has {twice!r} twice; every token has one id.")
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # tokenizers raises a plain one
        raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from error
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=BERT["unk_token"]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    start, end = BERT["cls_token"], BERT["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(start, ids[start]), (end, ids[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **BERT,
        bos_token=start,
        eos_token=end,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


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


def _words_alone(known: list[str]) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return tokenizer


def _spelling(known: list[str]) -> Tokenizer:
    # Every token of a word starts with a space, so a word of one letter is never taken for the letter of another word.
    names = [*SPECIAL, *(f" {word}" for word in known), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: index for index, name in enumerate(names)}
    # Without merges, a word is either looked up whole (ignore_merges) or cut into bytes.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, byte_fallback=True, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="always", split=False),
        ]
    )
    special_token = Regex("^(?=" + "|".join(map(_quoted, SPECIAL)) + ")")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(special_token, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _plain(known: list[str]) -> normalizers.Normalizer:
    """Drop punctuation at the ends of words, and turn the capital of a word that is known in small letters."""
    small = [word for word in known if word[0].islower() and word.capitalize() not in known]
    steps = [normalizers.Replace(Regex(r"(?<=\w)[.,;:!?]+(?!\S)"), "")]
    for letter, words in groupby(small, lambda word: word[0]):
        rest = "|".join(re.escape(word[1:]) for word in words)
        steps.append(normalizers.Replace(Regex(rf"(?<!\S){letter.upper()}(?=(?:{rest})(?!\S))"), letter))
    return normalizers.Sequence(steps)


def _quoted(token: str) -> str:
    return token.replace("|", r"\|")
