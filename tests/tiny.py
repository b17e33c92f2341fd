"""Tiny models of every family, and random batches."""

import pytest
import torch

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion.masking import positions_of
from memdlm.models import (
    A2DLlamaConfig,
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    MDLMConfig,
    SDARConfig,
    SmallDLMConfig,
    build_model,
)

V, MASK, PAD = 32, 31, 30

QWEN = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}

CONFIGS = {
    "dream": lambda: DreamConfig(**QWEN),
    "sdar": lambda: SDARConfig(**QWEN, head_dim=12),
    "llada": lambda: LLaDAConfig(vocab_size=V, d_model=32, mlp_hidden_size=48, n_layers=3, n_heads=4, init_std=0.3),
    "llada_switches": lambda: LLaDAConfig(
        vocab_size=V,
        embedding_size=V + 4,
        d_model=32,
        mlp_hidden_size=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        include_bias=True,
        input_emb_norm=True,
        scale_logits=True,
        weight_tying=True,
        init_std=0.3,
    ),
    "llada2": lambda: LLaDA2MoeConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        initializer_range=0.2,
    ),
    "lladamoe": lambda: LLaDAMoEConfig(
        vocab_size=V,
        hidden_size=32,
        dense_intermediate_size=48,
        expert_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        moe_layer_freq=[0, 1, 1],
        moe_router_enable_expert_bias=True,
        initializer_range=0.3,
    ),
    "mdlm": lambda: MDLMConfig(
        vocab_size=V, hidden_dim=32, cond_dim=12, n_blocks=2, n_heads=4, initializer_range=0.3, adaln_zero=False
    ),
    "small": lambda: SmallDLMConfig(vocab_size=V, hidden_size=32, intermediate_size=48, initializer_range=0.3),
    "small_windowed": lambda: SmallDLMConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, sliding_window=3, initializer_range=0.3
    ),
}

A2D = {
    "a2d_qwen2": lambda: A2DQwen2Config(**QWEN),
    "a2d_qwen3": lambda: A2DQwen3Config(**QWEN, head_dim=12, tie_word_embeddings=True),
    "a2d_llama": lambda: A2DLlamaConfig(**QWEN),
}
"""Families whose network is that of Dream or SDAR; they run in the tests of networks, names and files."""


def families(*slow: str) -> pytest.MarkDecorator:
    """Every family as a parameter; those that share their network with another may be `slow` in a long test."""
    marks = {family: pytest.mark.slow if family in slow else () for family in CONFIGS}
    return pytest.mark.parametrize("family", [pytest.param(name, marks=marks[name]) for name in sorted(CONFIGS)])


def tiny(name: str, dtype=torch.float32, seed: int = 0):
    return build_model({**CONFIGS, **A2D}[name](), seed=seed).to(dtype).eval()


def saved_with_words(name: str, folder):
    """Save a tiny model with a tokenizer of the words w0, w1, ...; returns the folder and the tokenizer."""
    tokenizer = build_word_tokenizer([f"w{index}" for index in range(V - 5)])
    tiny(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, PAD, (rows, length), generator=rng(seed))


def assign(fast, values: dict[str, torch.Tensor]) -> None:
    """Set fast weights by the names of `fast.named()`."""
    current = fast.named()
    assert {name: value.shape for name, value in values.items()} == {name: old.shape for name, old in current.items()}
    fast.replace([values[name].to(old).detach().requires_grad_() for name, old in current.items()])


def inner_loss(memory, denoise, step) -> torch.Tensor:
    """The memory's inner loss [S] at one state."""
    return memory.loss.at(step, positions_of(step.is_read), denoise, memory.fast.num_samples)(denoise)


def predicted(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] of the token at each position, whichever output of the network holds them."""
    logits = model(ids).logits
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if model.right_shift_logits else logits
