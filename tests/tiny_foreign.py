"""Tiny models of other families, as transformers has them."""

from transformers import BertConfig, BertForMaskedLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tiny import PAD

BERT = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
QWEN = {
    **{"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4},
    **{"num_experts_per_tok": 2, "is_causal": False, "pad_token_id": PAD},
}
FOREIGN = {
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "a decoder with stacked experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN)),
}
