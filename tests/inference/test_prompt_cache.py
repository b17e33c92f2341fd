"""A prompt cache changes no token, whatever was decoded before, with which memory; and it does save the work."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_exactness import as_sure

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.inference import Decoder, GenerationConfig, PromptCache, generate, stream
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import BlockCausal
from tiny import V, rng, tiny

WORDS = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
MODELS = {name: tiny(name, torch.float64) for name in ("llada2", "llada")}
DRAWN = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def memory_of(model, fraction, rate=1.0):
    config = MemoryConfig(inner_layer_fraction=fraction, inner_rank=4, inner_alpha=16.0, inner_lr=rate)
    return ParametricMemory(model, config, mask_token_id=WORDS.mask_token_id)


def prompts_of(calls):
    """Texts that begin alike: (seed, length) of a few long ones."""
    return [torch.randint(5, V, (24,), generator=rng(seed))[:length] for seed, length in calls]


CALL = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), min_size=1, max_size=3)


@pytest.mark.parametrize("family", sorted(MODELS))
@settings(max_examples=15, **DRAWN)
@given(
    calls=st.lists(st.tuples(CALL, st.sampled_from([None, 0.3, 1.0])), min_size=2, max_size=4),
    fraction=st.sampled_from([0.5, None]),
    block=st.integers(1, 6),
    max_prompts=st.integers(1, 4),
    guided=st.booleans(),
)
def test_no_token_changes(family, calls, fraction, block, max_prompts, guided):
    model, pattern = MODELS[family], BlockCausal(block)
    config = GenerationConfig(max_new_tokens=7, block_size=block, threshold=0.3, cfg_scale=0.7 if guided else 0.0)
    cache = PromptCache(model, None if fraction is None else memory_of(model, fraction), max_prompts=max_prompts)
    for call, rate in calls:
        memory = None if rate is None or fraction is None else memory_of(model, fraction, rate)
        more = {"memory": memory, "attention_pattern": pattern}
        plain = list(stream(model, WORDS, prompts_of(call), config, **more))
        as_sure(list(stream(model, WORDS, prompts_of(call), config, **more, prompt_cache=cache)), plain)
        assert len(cache) <= max_prompts


def test_what_is_known_is_not_computed_again():
    model = MODELS["llada2"]
    config = GenerationConfig(max_new_tokens=4, block_size=4, threshold=0.9)
    memory = memory_of(model, 0.5)
    cache, prompts = PromptCache(model, memory), prompts_of([(0, 22), (1, 22)])
    first = generate(model, WORDS, prompts, config, prompt_cache=cache)
    assert first.num_reused_positions == 0
    again = generate(model, WORDS, prompts, config, memory=memory, prompt_cache=cache)
    assert again.num_reused_positions == 40
    assert first.num_token_positions - again.num_token_positions >= 40 or first.num_forward_passes != (
        again.num_forward_passes
    )
    ran = []
    hooks = [
        layer.register_forward_hook(lambda m, given, out, i=i: ran.append((i, given[0].shape[1])))
        for i, layer in enumerate(model.model.layers)
    ]
    list(stream(model, WORDS, prompts[:1], config, memory=memory, prompt_cache=cache))
    for hook in hooks:
        hook.remove()
    boundary = memory.first_block
    # The write itself sees the whole prompt; decoding sees it above the boundary alone.
    decoding = [(i, n) for i, n in ran if n != 22]
    assert 20 in {n for i, n in decoding if i >= boundary}
    assert all(n <= 8 for i, n in decoding if i < boundary)


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("shared", range(4, 13))
def test_what_two_prompts_share_is_cut_to_whole_blocks(shared, remembers):
    """The states of a block depend on all of it, also on what comes after the last token that is shared."""
    model, (first,) = MODELS["llada2"], prompts_of([(0, 20)])
    second = first.clone()
    second[shared:] = (second[shared:] - 5 + 1) % (V - 5) + 5
    memory = memory_of(model, 0.5) if remembers else None
    cache, config = PromptCache(model, memory), GenerationConfig(max_new_tokens=5, block_size=4)
    generate(model, WORDS, [first], config, memory=memory, prompt_cache=cache)
    job = Decoder(model, WORDS, config, memory=memory, prompt_cache=cache).prepare([second])
    as_sure(list(job.steps()), list(stream(model, WORDS, [second], config, memory=memory)))
    assert job.meter.reused == shared // 4 * 4
    # What was put together of a known beginning and a new end serves the next one.
    third = torch.cat((second[:17], first[:6]))
    as_sure(
        list(stream(model, WORDS, [third], config, memory=memory, prompt_cache=cache)),
        list(stream(model, WORDS, [third], config, memory=memory)),
    )


def test_a_longer_conversation_continues_a_shorter_one():
    model = MODELS["llada2"]
    config = GenerationConfig(max_new_tokens=4, block_size=4)
    cache = PromptCache(model)
    generate(model, WORDS, prompts_of([(0, 9)]), config, prompt_cache=cache)
    grown = generate(model, WORDS, prompts_of([(0, 23)]), config, prompt_cache=cache)
    assert (grown.num_reused_positions, len(cache)) == (8, 1)
    cache.clear()
    assert len(cache) == 0


def test_what_cannot_be_shared_is_refused():
    model = MODELS["llada2"]
    config = GenerationConfig(max_new_tokens=4, block_size=4)
    prompts = prompts_of([(0, 9)])
    with pytest.raises(ConfigError, match="memory changes blocks from"):
        generate(model, WORDS, prompts, config, memory=memory_of(model, 0.5), prompt_cache=PromptCache(model))
    other = tiny("llada2", torch.float64)
    with pytest.raises(ConfigError, match="another model"):
        generate(other, WORDS, prompts, config, prompt_cache=PromptCache(model))
    with pytest.raises(ConfigError, match="block-causal"):
        generate(MODELS["llada"], WORDS, prompts, config, prompt_cache=PromptCache(MODELS["llada"]))
    none = GenerationConfig(max_new_tokens=4, block_size=4, cache="none")
    with pytest.raises(ConfigError, match="block-causal"):
        generate(model, WORDS, prompts, none, prompt_cache=PromptCache(model))
    with pytest.raises(ConfigError, match="every block"):
        PromptCache(model, memory_of(model, 1.0))
    with pytest.raises(ConfigError, match="max_prompts"):
        PromptCache(model, max_prompts=0)
    with pytest.raises(ConfigError, match="keeps no keys"):
        PromptCache(tiny("small_windowed", torch.float64))
