"""Tokenizers of all kinds: those of three families, the package's word tokenizer, a byte-level BPE; and texts."""

import functools
from pathlib import Path

import tokenizers
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.models.hub.families import LLADA_TEMPLATE
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.templates import control_of

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
    backend.train_from_iterator(["the mask is on the left, and the text ends at the <|end|>"], trainer)
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
