"""The approximate cache: exact when everything is refreshed, and never worse than a guess about what it saves."""

import pytest
import torch
from test_exactness import as_sure, decoded, memory_of, network, prompts_of, same, words

from memdlm.errors import ConfigError
from memdlm.inference import GenerationConfig, generate

FAMILIES = ("llada", "llada_switches", "lladamoe")


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("scope", ["dual", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_refreshing_every_step_is_exact(family, scope, remembers):
    prompts = prompts_of([7, 3, 12])
    memory = memory_of(family) if remembers else None
    options = {"max_new_tokens": 9, "block_size": 4}
    exact = decoded(network(family), prompts, GenerationConfig(**options), memory=memory)
    config = GenerationConfig(**options, cache="approximate", cache_scope=scope, cache_refresh=1)
    as_sure(decoded(network(family), prompts, config, memory=memory), exact)


@pytest.mark.parametrize("scope", ["dual", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_saves_work_whatever_the_batch(family, scope):
    prompts = prompts_of([30, 18, 25])
    options = {"max_new_tokens": 12, "block_size": 6, "suppress_tokens": (0,)}
    exact = generate(network(family), words(), prompts, GenerationConfig(**options))
    config = GenerationConfig(**options, cache="approximate", cache_scope=scope, cache_refresh=100)
    together = generate(network(family), words(), prompts, config)
    assert together.unresolved == 0
    assert together.num_token_positions < exact.num_token_positions / 2
    same(together.sequences, [generate(network(family), words(), [p], config).sequences[0] for p in prompts])


def test_it_is_not_exact_so_nobody_gets_it_unasked():
    prompts = prompts_of([20] * 6)
    options = {"max_new_tokens": 16, "block_size": 8, "suppress_tokens": (0,)}
    exact = generate(network("llada"), words(), prompts, GenerationConfig(**options))
    config = GenerationConfig(**options, cache="approximate", cache_refresh=100)
    stale = generate(network("llada"), words(), prompts, config)
    pairs = zip(exact.sequences, stale.sequences, strict=True)
    agreement = torch.stack([(a[20:] == b[20:]).float().mean() for a, b in pairs]).mean()
    assert agreement < 1
    assert GenerationConfig().cache == "exact"


@pytest.mark.parametrize(
    ("family", "options"), [("llada2", {}), ("small", {}), ("llada", {"right_shift_logits": True})], ids=str
)
def test_where_it_cannot_take_effect_it_is_refused(family, options):
    config = GenerationConfig(max_new_tokens=4, cache="approximate", **options)
    with pytest.raises(ConfigError, match="cache='approximate' is for LLaDA and LLaDA-MoE"):
        generate(network(family), words(), prompts_of([5]), config)
