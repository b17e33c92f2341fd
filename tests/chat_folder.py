"""Tiny models in the published layout with a tokenizer beside them, and conversations in a file."""

import json
import random

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.models import build_model
from tiny import CONFIGS

WORDS = 24
FAMILIES = ("llada", "lladamoe", "llada2", "dream", "sdar")
TOKENS = (
    "<|mdm_mask|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|role_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)


def make_tokenizer():
    tokenizer = build_word_tokenizer(f"w{index}" for index in range(WORDS))
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    return tokenizer


def make_model(folder, family="lladamoe", seed=0, **changes):
    """Save a model and its tokenizer; returns the folder's name."""
    tokenizer = make_tokenizer()
    config = CONFIGS[family]()
    config.update({"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0, **changes})
    if family == "llada":
        config.embedding_size = len(tokenizer)
    build_model(config, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_chat(path, count=24, *, is_even=False, seed=0):
    """Write conversations of random words, all of one length if `is_even`; returns the file's name."""
    draw = random.Random(seed)
    words = lambda n: " ".join(f"w{draw.randrange(WORDS)}" for _ in range(n))
    rows = []
    for _ in range(count):
        asked, answered = (4, 4) if is_even else (draw.randint(2, 9), draw.randint(1, 6))
        turns = (("user", words(asked)), ("assistant", words(answered)))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
