"""Who sees whom during a write."""

from torch import nn

from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal, Full
from memdlm.models.hub.families import decoding_pattern, writing_pattern


def write_pattern(
    network: nn.Module, config: MemoryConfig, given: AttentionPattern | None = None
) -> AttentionPattern | None:
    """Return the attention of a memory's writes, as `mem_attention` says; None: every token sees every other.

    `given` is the caller's wish, which `mem_attention=full` lets through. Raises ConfigError where
    `mem_attention=decode` contradicts it or the network, and where `mem_batch_mix` or chunks do not fit its blocks.
    """
    attention, published = config.attention, getattr(network, "config", None)
    if attention == "full" or (attention is None and given is not None):
        return given
    pattern = decoding_pattern(published) if attention == "decode" else writing_pattern(published)
    if attention is None and isinstance(pattern, Full):
        return None
    if given not in (None, pattern):
        raise ConfigError(f"mem_attention='decode' writes under {pattern}, not {given}; leave one of them out.")
    if not isinstance(pattern, BlockCausal):
        raise ConfigError(
            "mem_attention='decode' has no effect: this model decodes under full attention. Leave it out."
        )
    if config.batch_mix is not None:
        raise ConfigError(
            f"mem_batch_mix={config.batch_mix!r} is not combined with writes under {pattern}, which this "
            "model's are; set mem_attention=full, or leave mem_batch_mix out."
        )
    for name in ("chunk_length", "chunk_overlap"):
        if (getattr(config, name) or 0) % pattern.block:
            raise ConfigError(
                f"mem_{name}={getattr(config, name)} cuts through the blocks of {pattern.block} tokens that "
                "this memory is written under; use a multiple, or set mem_attention=full."
            )
    return pattern
