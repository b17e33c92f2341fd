"""Compare the sizes in a configuration with the weights beside it, before a network is built from them."""

from transformers import PreTrainedConfig

from memdlm.errors import CheckpointError

LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
WIDTHS = ("vocab_size", "embedding_size", "intermediate_size", "mlp_hidden_size")
"""Each of them is one side of a matrix whose other side is the hidden size."""
OTHERS = (
    *("num_attention_heads", "num_key_value_heads", "n_heads", "n_kv_heads", "head_dim"),
    *("num_experts", "moe_intermediate_size", "dense_intermediate_size", "expert_intermediate_size"),
    *("shared_expert_intermediate_size", "num_shared_experts", "n_routed_experts"),
)
MOST_LAYERS, MOST_WIDE, MOST_POSITIONS = 2**12, 2**24, 2**31
"""Limits where the weights are unknown: far beyond every existing model."""
PACKED = 2
"""Numbers per byte, at most (4 bits)."""


def check_sizes(config: PreTrainedConfig, name: str, weights: tuple[int, int] | None) -> None:
    """Raise CheckpointError for sizes that the weights (tensors, bytes; None: unknown) cannot have.

    Without this, a mistake in config.json, or a hostile one, takes all memory before any tensor is compared.
    """
    tensors, size = weights or (MOST_LAYERS, MOST_WIDE**2)
    hidden = _size(config, "hidden_size", name, MOST_WIDE) or 1
    layers = [_size(config, field, name, min(tensors, MOST_LAYERS)) for field in LAYERS]
    widths = [_size(config, field, name, MOST_WIDE) for field in WIDTHS]
    _size(config, "max_position_embeddings", name, MOST_POSITIONS)
    for field in OTHERS:
        _size(config, field, name, min(MOST_WIDE, PACKED * size))
    needed = hidden * max(1, *widths, *layers)
    if needed > PACKED * size:
        raise CheckpointError(
            f"model {name!r}: its config.json describes a matrix of {needed} numbers, but the weights have {size} "
            "bytes. They do not belong together: correct config.json, or fetch the weights again."
        )


def _size(config: PreTrainedConfig, field: str, name: str, most: int) -> int:
    """Return a size, or 0 if the configuration does not state it, or states it layer by layer."""
    value = getattr(config, field, None)
    if value is None or isinstance(value, list):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise CheckpointError(
            f"model {name!r}: {field} in its config.json is {value!r}; with these weights it is a whole number up to "
            f"{most}."
        )
    return value
